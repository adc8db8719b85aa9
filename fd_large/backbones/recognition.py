"""Recognises architectures from names and shapes of tensors, and from other libraries' terms."""

from __future__ import annotations

import math
import re

from fd_large.backbones.translation import Shapes
from fd_large.errors import WeightsError
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.family import MOST_BLOCKS


def count_of(shapes: Shapes, pattern: str) -> int:
    """Returns the largest number that a pattern finds in names, plus one.

    Raises: ValueError: if the number of layers is impossible.
    """
    matches = (re.match(pattern, name) for name in shapes)
    count = max((int(match[1]) + 1 for match in matches if match), default=0)
    if count > MOST_BLOCKS:
        raise ValueError(f"a name with the number {count - 1:,} of a layer")
    return count


def mlp_ratio(shapes: Shapes, name: str, width: int) -> float | None:
    """Returns the ratio of an MLP's hidden width to its width, from its first layer's weight."""
    return shapes[name][0] / width if name in shapes else None


def qkv_bias(shapes: Shapes, attention: str) -> str:
    """Returns which of query, key and value have biases, from the names in an attention."""
    if f"{attention}qkv.bias" in shapes:
        return "fused"
    if f"{attention}q_bias" in shapes:
        return "qkv" if f"{attention}k_bias" in shapes else "qv"
    return "none"


def side_of(cells: int) -> int:
    """Returns the side of a square grid with this number of cells, or 0 if not square."""
    side = math.isqrt(max(cells, 0))
    return side if side * side == cells else 0


def grid_of(offsets: int) -> int:
    """Returns the side n of a grid with (2n - 1)^2 offsets, or 0."""
    return (side_of(offsets) + 1) // 2 if side_of(offsets) % 2 else 0


_ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "GELU": "gelu",
    "QuickGELU": "quick_gelu",
}


def size_to_compare(known: Architecture) -> dict[str, int]:
    """Returns an arbitrary image size for a model whose shapes do not depend on it; else {}."""
    if known.patch_size is None or known.absolute_position:
        return {}
    return {"image_size": known.patch_size * 2 ** len(known.depths or ())}


def activation_named(name: str | None, where: str, *, of: str) -> str | None:
    """Returns our name of a library's activation.

    Raises: WeightsError: for an unsupported activation.
    """
    if name is not None and name not in _ACTIVATIONS:
        raise WeightsError(
            f"{where}: unsupported activation; got {of} {name!r}, expected gelu or "
            "quick_gelu. Use other weights, or a teacher timm:NAME."
        )
    return name and _ACTIVATIONS[name]
