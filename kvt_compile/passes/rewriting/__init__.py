"""Sites -> the same graph with one `kvt::` node for each.  Start at `rewrite.py`."""
