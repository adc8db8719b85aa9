"""Fused operations: one file each, its plain torch version in it, its Triton kernels beside it.

`choose.py` decides what runs: kernels, the plain version through torch.compile, or as it is.
Kernels are in `*_triton.py`, where alone Triton is imported; their launches, which are torch's
operations, in `*_launch.py`. Nothing here knows a model.
"""
