"""The feature map of every backbone: tokens with their grid."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FeatureMap(NamedTuple):
    """Tokens of an image, prefix tokens (CLS, distillation) first, patches row-major.

    A NamedTuple, because DeepSpeed's ZeRO-3 hooks find the tensors inside tuples and nowhere else:
    a parameter that a module owns directly would miss its gather before backward otherwise.

    Attributes:
        tokens: (B, N, C), N = num_prefix_tokens + H * W.
        grid: (H, W).
        num_prefix_tokens: Tokens before the patches.
        summary: (B, 1, C), the image's class token if the map leaves it out (timm's models), else
            None.
    """

    tokens: Tensor
    grid: tuple[int, int]
    num_prefix_tokens: int
    summary: Tensor | None = None
