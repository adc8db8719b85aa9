"""Writes, verifies and reshards the state of a run on disk, and reads it as full tensors.

This package does not know DeepSpeed's tensors: the engine passes named shards with their layout,
and takes slices back.
"""
