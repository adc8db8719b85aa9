"""Box coders, for boxes as differences from proposals in units that shrink along a cascade.

Sources: torchvision's coder, which is detectron2's; mmdetection's delta_xywh_bbox_coder.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fd_large.engine.zero.private_names import get

BoxCoder = get("torchvision.models.detection._utils:BoxCoder")


class TwoSidedBoxCoder(BoxCoder):  # type: ignore[misc, valid-type]
    """mmdetection's box coder, which limits shrinking, like growing, to a factor of 1000 / 16."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Maps differences (N, 4 k) and boxes (N, 4) to boxes (N, 4 k)."""
        places, sizes = rel_codes.unflatten(1, (-1, 4)).split(2, dim=2)
        least = -self.bbox_xform_clip * self.weights[2]  # The unit of height is that of width.
        codes = torch.cat([places, sizes.clamp(min=least)], dim=2)
        return super().decode_single(codes.flatten(1), boxes)


DETECTRON2 = tuple(BoxCoder(weights=(n, n, n / 2, n / 2)) for n in (10.0, 20.0, 30.0))
"""The coder of each stage of a cascade; the first is that of Mask R-CNN."""
# The units of the third stage are not a thirtieth, but those of the published configurations.
MMDET = tuple(
    TwoSidedBoxCoder(weights=(1 / place, 1 / place, 1 / size, 1 / size))
    for place, size in ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067))
)
"""The coder of each stage: the published standard deviations of the differences, inverted."""
