"""A model -> one graph with shapes (capture.py); what a capture must not lose or disturb; what stays outside of it."""
