"""What a value computes along a row, by algebra.  Start at `recognise.py`."""
