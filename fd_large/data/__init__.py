"""Images to batches: every sample is a function of (seed, epoch, position in the epoch).

Here live the sources of images (`source.py` has their contract and the table of them), decoding,
views, the order of an epoch, the loader, labels, and the copy on a node's disk. What a task alone
does to its samples (mixing, boxes, masks) stands in the task's folder; no model, no engine and no
task is known here.
"""
