"""Code that the tasks with dense targets share: detection, segmentation and depth.

It has the necks that turn a distilled student's maps into maps of several strides, convolutions
that can be built under ZeRO-3, and the geometry of images with dense targets. Boxes, classes,
losses and scores are in the folders of the tasks.
"""
