"""What a batch of images is taught: boxes, classes, masks and crowds of each image.

NamedTuples, because a batch is moved to the device and pinned by walking through tuples.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Target(NamedTuple):
    """The objects of one image, in pixels of the padded image.

    Attributes:
        boxes: (n, 4) float32, left, top, right, bottom.
        labels: (n,) int64, 0 to K - 1.
        masks: (n, H, W) uint8, 0 or 1.
        crowd_boxes: (m, 4) float32, regions of objects that were not told apart.
        image_id: The data set's number of the image.
    """

    boxes: Tensor
    labels: Tensor
    masks: Tensor
    crowd_boxes: Tensor
    image_id: int


class Targets(NamedTuple):
    """The targets of a batch.

    Attributes:
        targets: One per image, in the order of the images.
        sizes: (B, 2) int64, height and width of each image without its padding.
        positions: (B,) int64, in the epoch's order: what random choices of a sample depend on.
        epoch: Counted from 0.
    """

    targets: list[Target]
    sizes: Tensor
    positions: Tensor
    epoch: int
