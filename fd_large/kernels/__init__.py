"""Fused operations, each in a file with its plain torch version; Triton kernels have own files.

`choose.py` selects the implementation: kernels, or the plain version with or without
torch.compile. `operation.py` has what operations share; `check.py` compares operations with their
plain versions when a run starts. Kernels are in `*_triton.py`, the only files that import Triton.
No file here imports a model.
"""
