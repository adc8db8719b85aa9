"""RoIAlign over the levels of a pyramid.

Each level is pooled in every call, even without boxes, so that the graph has the same form on all
ranks. torchvision's own pooler guesses strides from its first batch and shifts boxes by half a
pixel; only its level rule and its operation are used.

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
    """Pools boxes from the level that fits their size.

    A batch without boxes returns the features of one dummy box: all ranks must call the same
    modules, and no library guarantees gradients of a head without input.

    Args:
        maps: Four levels, finest first, (B, C, H, W) each; further levels are ignored.
        strides: Pixels per place of each level.
        boxes: (n, 4) float32 of each image, in pixels.
        side: Rows and columns of a box's pooled features.

    Returns: (R, C, side, side) in the dtype of the maps, with R the number of boxes, at least 1.
    """
    boxes, rois = _rois(boxes)
    wide = torch.promote_types(maps[0].dtype, torch.float32)
    pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], side, side, dtype=wide)
    for level, here in enumerate(_places_by_level(boxes)):
        cuts = _cut(maps[level], strides[level], rois[here], side)
        pooled = pooled.index_add(0, here, cuts)
    return pooled.to(maps[0].dtype)


def pool_one(level: Tensor, stride: float, boxes: Sequence[Tensor], side: int) -> Tensor:
    """Pools boxes of any size from a single map (B, C, H, W); otherwise like `pool`."""
    return _cut(level, stride, _rois(boxes)[1], side).to(level.dtype)


def _rois(boxes: Sequence[Tensor]) -> tuple[Sequence[Tensor], Tensor]:
    """Returns the boxes (or one dummy box), alone and with their images' indices (R, 5)."""
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
    """Returns the indices of each level's boxes; equal shares on the meta device, without sizes."""
    if boxes[0].is_meta:
        every = torch.arange(sum(map(len, boxes)), device="meta")
        return [every[level::NUM_LEVELS] for level in range(NUM_LEVELS)]
    levels = _LEVELS(list(boxes))
    return [torch.where(levels == level)[0] for level in range(NUM_LEVELS)]
