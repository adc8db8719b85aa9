"""The state of a run on disk: writing, verification, resharding, reading as full tensors.

This package does not know DeepSpeed's tensors: the engine passes named shards with their layout,
and takes slices back.
"""
