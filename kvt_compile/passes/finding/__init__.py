"""Expressions -> attention sites and refusals.  Start at `find.py`."""
