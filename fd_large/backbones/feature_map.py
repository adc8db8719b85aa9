"""The feature map of every backbone: tokens with their grid."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class FeatureMap(NamedTuple):
    """Tokens of B images: first the prefix tokens (CLS, distillation), then patches row by row.

    A NamedTuple, because DeepSpeed's ZeRO-3 hooks find the tensors inside tuples and nowhere else:
    a parameter that a module owns directly would miss its gather before backward otherwise.

    Attributes:
        tokens: (B, N, C), where N = num_prefix_tokens + H * W.
        grid: (H, W), rows and columns of the patches.
        num_prefix_tokens: Number of tokens before the patches.
        summary: (B, 1, C), the class token of each image if `tokens` leaves it out (timm's models),
            else None.
    """

    tokens: Tensor
    grid: tuple[int, int]
    num_prefix_tokens: int
    summary: Tensor | None = None
