"""Fused operations, each of which also has a plain torch version.

`choose.py` selects the implementation: kernels, or the plain version with or without
torch.compile. `operation.py` has what operations share; `check.py` compares operations with their
plain versions when a run starts. Triton kernels are in the files `*_triton.py`, the only files that
import Triton. No file here imports a model.
"""
