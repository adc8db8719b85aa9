"""RoIAlign over the levels of a pyramid.

Each level is pooled in every call, whether it has a box or not: the graph has one shape on all
ranks. torchvision's own pooler guesses strides from the first batch it sees and shifts boxes by
half a pixel; its level rule and its operation serve.

Sources: He et al., arXiv 1703.06870; Lin et al., arXiv 1612.03144, equation 1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torchvision.ops import roi_align
from torchvision.ops.poolers import LevelMapper

# A box of 224 pixels takes the third level, as in a ResNet of ImageNet's size.
_LEVELS = LevelMapper(k_min=2, k_max=5, canonical_scale=224, canonical_level=4)
_SAMPLES = 2  # Points per cell, each way.


def pool(
    maps: Sequence[Tensor], strides: Sequence[float], boxes: Sequence[Tensor], side: int
) -> Tensor:
    """Cuts boxes out of the level that fits their size.

    Args:
        maps: Four levels, finest first, (B, C, H, W) each; further ones are not used.
        strides: Pixels per place of each level.
        boxes: Of each image (n, 4) float32, in pixels.
        side: Of a cut in places.

    Returns: (sum of n, C, side, side) in the dtype of the maps.
    """
    levels = _LEVELS(list(boxes))
    numbers = [torch.full_like(b[:, :1], i) for i, b in enumerate(boxes)]
    rois = torch.cat([torch.cat(numbers), torch.cat(list(boxes))], dim=1)  # (R, 5)
    pooled = maps[0].new_zeros(len(rois), maps[0].shape[1], side, side, dtype=torch.float32)
    for level in range(_LEVELS.k_max - _LEVELS.k_min + 1):
        here = torch.where(levels == level)[0]
        # In float32: torchvision's kernels know no bfloat16, and places are fractions.
        cuts = roi_align(
            maps[level].float(),
            rois[here],
            (side, side),
            1 / strides[level],
            _SAMPLES,
            aligned=True,
        )
        pooled = pooled.index_add(0, here, cuts)
    return pooled.to(maps[0].dtype)
