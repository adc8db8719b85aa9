"""Detection: boxes and masks of objects, by a two-stage detector on a distilled student.

`data/` turns annotations in COCO's format into targets, `heads/` has the trained modules on top of
the pyramid, and `scores/` has the official evaluation and its plots. Code that segmentation and
depth use as well is in `tasks/dense/`.
"""
