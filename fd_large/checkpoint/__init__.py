"""Writes and verifies checkpoints, and reads them as full tensors or as shards for any rank count.

This package does not know DeepSpeed's tensors. The engine passes named shards with their layout,
and reads slices of named tensors.
"""
