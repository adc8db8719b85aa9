"""Code of all tasks with a target at every place of an image: detection, segmentation, depth.

Here live the way from a distilled student to maps of several strides, convolutions that build under
ZeRO-3, and the geometry of images with dense targets. Boxes, classes, losses and scores belong to
the tasks.
"""
