"""Derives architecture fields from names and shapes of tensors, and from libraries' own terms."""

from __future__ import annotations

import math
import re

from fd_large.backbones.translation import Shapes
from fd_large.errors import WeightsError
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.family import MOST_BLOCKS


def count_of(shapes: Shapes, pattern: str) -> int:
    """Returns the number of layers that tensor names show; 0 if no name matches the pattern.

    Args:
        shapes: Shapes of the tensors, by our names.
        pattern: Regular expression for the start of a name; its first group is the number of the
            layer, from 0.

    Raises: ValueError: if there are more than `MOST_BLOCKS` layers.
    """
    matches = (re.match(pattern, name) for name in shapes)
    count = max((int(match[1]) + 1 for match in matches if match), default=0)
    if count > MOST_BLOCKS:
        raise ValueError(f"a name with the number {count - 1:,} of a layer")
    return count


def mlp_ratio(shapes: Shapes, name: str, width: int) -> float | None:
    """Returns the ratio of an MLP's hidden width to `width`, or None if no tensor has the name.

    Args:
        shapes: Shapes of the tensors, by our names.
        name: Name of the weight of the MLP's first layer.
        width: Channels of the MLP's input.
    """
    return shapes[name][0] / width if name in shapes else None


def qkv_bias(shapes: Shapes, attention: str) -> str:
    """Returns the architecture field `qkv_bias` that the tensors of an attention module show.

    Args:
        shapes: Shapes of the tensors, by our names.
        attention: Prefix of the names of the module's tensors.

    Returns: "fused" for one bias vector of query, key and value together, "qkv" for a vector of
        each, "qv" for a vector of query and of value, or "none".
    """
    if f"{attention}qkv.bias" in shapes:
        return "fused"
    if f"{attention}q_bias" in shapes:
        return "qkv" if f"{attention}k_bias" in shapes else "qv"
    return "none"


def side_of(cells: int) -> int:
    """Returns the side of a square grid with `cells` cells, or 0 if the number is not a square."""
    side = math.isqrt(max(cells, 0))
    return side if side * side == cells else 0


def grid_of(offsets: int) -> int:
    """Returns the side n of a square grid with (2n - 1)^2 = `offsets`, or 0 if there is none."""
    return (side_of(offsets) + 1) // 2 if side_of(offsets) % 2 else 0


_ACTIVATIONS = {
    "gelu": "gelu",
    "quick_gelu": "quick_gelu",
    "GELU": "gelu",
    "QuickGELU": "quick_gelu",
}


def size_to_compare(known: Architecture) -> dict[str, int]:
    """Returns {"image_size": an arbitrary valid size in pixels}, or {} if no size can be chosen.

    With this size, the shapes of a model whose image size is unknown can be computed. No size can
    be chosen if the model has absolute positions, whose shape depends on the image size, or if the
    patch size is unknown.

    Args:
        known: The known fields of the model's architecture.
    """
    if known.patch_size is None or known.absolute_position:
        return {}
    return {"image_size": known.patch_size * 2 ** len(known.depths or ())}


def activation_named(name: str | None, where: str, *, of: str) -> str | None:
    """Returns our name of a library's activation, or None for None.

    Args:
        name: The library's name of the activation.
        where: Field that the user set, for the message.
        of: The library's field that has the name, for the message.

    Raises: WeightsError: for an unsupported activation.
    """
    if name is not None and name not in _ACTIVATIONS:
        raise WeightsError(
            f"{where}: unsupported activation; got {of} {name!r}, expected gelu or "
            "quick_gelu. Use other weights, or a teacher timm:NAME."
        )
    return name and _ACTIVATIONS[name]
