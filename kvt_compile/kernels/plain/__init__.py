"""Lowerings made of torch operations: the contract itself (reference.py) and one that runs anywhere (aten.py)."""
