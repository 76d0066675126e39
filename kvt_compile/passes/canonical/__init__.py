"""Nodes -> values with a meaning: many spellings (spellings.py), one small vocabulary (canonicalise.py)."""
