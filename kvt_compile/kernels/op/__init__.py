"""What torch sees: the operators (ops.py; importing it registers them), their specs, checks, gradients, FLOPs, vmap."""
