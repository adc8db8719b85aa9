"""Fused operations: one file each, its plain torch version in it, its Triton kernels beside it.

`choose.py` decides which of the two runs. Triton is imported in `*_triton.py` only; nothing here
knows a model.
"""
