"""Values -> index functions and expressions (read.py), and what can be proved of them."""
