"""From images to batches: every sample is a function of (seed, epoch, position in the epoch).

This folder has the sources of images (`source.py` defines their interface and lists them), the
decoders, the views, the order of an epoch, the loader, the labels, and the cache on a node's disk.
Code for the samples of a single task (boxes, masks) is in the task's folder. This folder imports
no model, engine or task.
"""
