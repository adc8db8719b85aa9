"""From images to batches: every sample is a function of (seed, epoch, position in the epoch).

This folder has the sources of images (`source.py` has their contract and their table), decoding,
views, the order of an epoch, the loader, labels, and the cache on a node's disk. Changes to
samples for a single task (mixing, boxes, masks) are in the task's folder; this folder knows
no model, engine or task.
"""
