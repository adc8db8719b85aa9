"""Detection: boxes and masks of objects, by a two-stage detector on a distilled student.

`data/` turns annotations in COCO's format to targets, `heads/` holds the trained modules on top of
the pyramid, `scores/` the official evaluation and its pictures. Code that any task with dense
targets would use lives in `tasks/dense/`.
"""
