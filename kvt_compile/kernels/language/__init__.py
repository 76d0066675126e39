"""What stands between the two products, as text and algebra (score.py), and its value on tensors (evaluate.py)."""
