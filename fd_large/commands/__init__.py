"""Commands of `python -m fd_large` that have words of their own, one file each."""
