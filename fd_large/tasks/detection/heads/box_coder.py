"""Box coders, which express boxes as deltas from proposals.

The units of the deltas are smaller in the later stages of a cascade.

Sources: torchvision's box coder, which computes the same as detectron2's; mmdetection's
delta_xywh_bbox_coder.py.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fd_large.engine.zero.private_names import get

BoxCoder = get("torchvision.models.detection._utils:BoxCoder")


class TwoSidedBoxCoder(BoxCoder):  # type: ignore[misc, valid-type]
    """mmdetection's box coder; a side of a box grows or shrinks at most by the factor 1000 / 16."""

    def decode_single(self, rel_codes: Tensor, boxes: Tensor) -> Tensor:
        """Applies k deltas to each of N boxes.

        Args:
            rel_codes: (N, 4 * k), the deltas.
            boxes: (N, 4): left, top, right, bottom.

        Returns: (N, 4 * k), the k resulting boxes for each of the N boxes.
        """
        places, sizes = rel_codes.unflatten(1, (-1, 4)).split(2, dim=2)
        least = -self.bbox_xform_clip * self.weights[2]  # The unit of height is that of width.
        codes = torch.cat([places, sizes.clamp(min=least)], dim=2)
        return super().decode_single(codes.flatten(1), boxes)


DETECTRON2 = tuple(BoxCoder(weights=(n, n, n / 2, n / 2)) for n in (10.0, 20.0, 30.0))
"""detectron2's box coder for each stage of a cascade. Mask R-CNN uses that of the first stage."""
# The third stage has 0.033 and 0.067, as in the published configurations, not 1/30 and 1/15.
MMDET = tuple(
    TwoSidedBoxCoder(weights=(1 / place, 1 / place, 1 / size, 1 / size))
    for place, size in ((0.1, 0.2), (0.05, 0.1), (0.033, 0.067))
)
"""mmdetection's box coder for each stage, whose weights are 1 / (published unit of the delta)."""
