"""Files and folders: whose they are (trust.py), how ours are written (write.py), texts that others wrote (text.py)."""
