"""Fused operations: one file each, its plain torch version in it, its Triton kernels beside it.

`choose.py` decides what runs: kernels, the plain version through torch.compile, or as it is.
`operation.py` is what operations are made of; `check.py` holds them against their plain versions
when a run starts. Kernels are in `*_triton.py`, where alone Triton is imported. Nothing here knows
a model.
"""
