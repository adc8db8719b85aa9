"""The state of a run on disk: written, verified, cut again for other ranks, read as full tensors.

What DeepSpeed holds and where is not known here: the engine hands over named shards and their
layout, and takes slices back.
"""
