"""k-NN attention by the names other libraries know it by; each module here is imported by whoever wants it."""
