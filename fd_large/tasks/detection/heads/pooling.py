"""RoIAlign, which pools the features of boxes from the levels of a pyramid.

Every call pools from all levels, even from levels without boxes, so that the autograd graph has the
same form on all ranks. torchvision's class `MultiScaleRoIAlign` guesses strides from its first
batch and shifts boxes by half a pixel. Therefore only torchvision's rule for the level of a box and
its function `roi_align` are used.

Sources: He et al., arXiv 1703.06870; Lin et al., arXiv 1612.03144, equation 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align

from fd_large.engine.zero.private_names import get

NUM_LEVELS = 4
# A box of 224 x 224 pixels, the size of ImageNet's crops, is pooled from the third level.
_LEVELS = get("torchvision.ops.poolers:LevelMapper")(
    k_min=2, k_max=1 + NUM_LEVELS, canonical_scale=224, canonical_level=4
)
_SAMPLES = 0  # Points per cell along each axis; 0 takes as many as the cell has places.


def pool(
    maps: Sequence[Tensor], strides: Sequence[float], boxes: Sequence[Tensor], side: int
) -> Tensor:
    """Returns the features of boxes, each pooled from the level that fits the size of the box.

    For a batch without boxes, the features of a dummy box are returned, since all ranks must call
    the same modules, and no library guarantees gradients for a head with an empty input.

    Args:
        maps: At least four levels, finest first, (B, C, H, W) each; only the first four are used.
        strides: Stride of each level, in pixels.
        boxes: (n, 4) float32 for each image: left, top, right, bottom in pixels.
        side: Height and width of the pooled features of a box.

    Returns: (R, C, side, side) in the dtype of the maps. R is the number of boxes, at least 1.
    """
    boxes, rois = _rois(boxes)
    wide = torch.promote_types(maps[0].dtype, torch.float32)
    pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], side, side, dtype=wide)
    for level, here in enumerate(_places_by_level(boxes)):
        cuts = _cut(maps[level], strides[level], rois[here], side)
        pooled = pooled.index_add(0, here, cuts)
    return pooled.to(maps[0].dtype)


def pool_one(level: Tensor, stride: float, boxes: Sequence[Tensor], side: int) -> Tensor:
    """Returns the features of boxes, pooled from a single map.

    For a batch without boxes, the features of a dummy box are returned.

    Args:
        level: (B, C, H, W), the map.
        stride: Stride of the map, in pixels.
        boxes: (n, 4) float32 for each image: left, top, right, bottom in pixels.
        side: Height and width of the pooled features of a box.

    Returns: (R, C, side, side) in the dtype of the map. R is the number of boxes, at least 1.
    """
    return _cut(level, stride, _rois(boxes)[1], side).to(level.dtype)


def _rois(boxes: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor]:
    """Returns boxes in the two forms that pooling needs, at least one box.

    Args:
        boxes: (n, 4) for each image: left, top, right, bottom. If no image has a box, a dummy box
            is added to the first image.

    Returns: the boxes (n, 4) for each image, and all boxes in one tensor (R, 5), whose first column
        is the index of the box's image.
    """
    if not any(map(len, boxes)):
        boxes = [boxes[0].new_tensor([[0.0, 0.0, 1.0, 1.0]]), *boxes[1:]]
    numbers = [torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)]
    return boxes, torch.cat([torch.cat(numbers), torch.cat(list(boxes))], dim=1)


def _cut(level: Tensor, stride: float, rois: Tensor, side: int) -> Tensor:
    # In float32: torchvision's kernels know no bfloat16, and places are fractions.
    wide = torch.promote_types(level.dtype, torch.float32)
    return roi_align(
        level.to(wide), rois.to(wide), (side, side), 1 / stride, _SAMPLES, aligned=True
    )


def _places_by_level(boxes: Sequence[Tensor]) -> list[Tensor]:
    """Returns the indices (int64) of the boxes to pool from each of the `NUM_LEVELS` levels.

    The size of a box decides from which level its features are pooled. On the meta device, where
    the sizes of boxes are unknown, each level gets about the same number of boxes.

    Args:
        boxes: (n, 4) for each image: left, top, right, bottom in pixels. An index counts the boxes
            of all images, image by image.
    """
    if boxes[0].is_meta:
        every = torch.arange(sum(map(len, boxes)), device="meta")
        return [every[level::NUM_LEVELS] for level in range(NUM_LEVELS)]
    levels = _LEVELS(list(boxes))
    return [torch.where(levels == level)[0] for level in range(NUM_LEVELS)]
