"""Code shared by tasks with dense targets in an image: detection, segmentation and depth.

Here are the necks that turn a distilled student's maps into maps of several strides, convolutions
that can be built under ZeRO-3, and the geometry of images with dense targets. Boxes, classes,
losses and scores belong to the tasks.
"""
