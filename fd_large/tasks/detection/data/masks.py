"""Masks in COCO's formats: polygons, and run-length encoding (RLE) of pixels column by column.

The functions wrap faster-coco-eval's C++ code, with which detections are also scored, so that a
mask covers the same pixels as in COCO's own tools. Torch is not imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from types import ModuleType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fd_large.errors import ConfigError


def coco_masks() -> ModuleType:
    """Imports and returns faster-coco-eval's module of mask functions.

    Raises: ConfigError: if the package is missing.
    """
    try:
        from faster_coco_eval.core import mask
    except ImportError as error:
        raise ConfigError(
            f"detection: a package is missing; got {error}, expected faster-coco-eval. "
            "Install it with pip install 'fd_large[detection]'."
        ) from error
    return mask


def from_polygons(polygons: Sequence[NDArray[np.floating]], height: int, width: int) -> NDArray:
    """Returns the mask of the union of polygons.

    Args:
        polygons: (points, 2) each, x and y in pixels. Parts outside the mask are cut off. The
            cost grows with the length of the edges.
        height: Height of the mask.
        width: Width of the mask.

    Returns: (height, width) uint8, 0 or 1.
    """
    mask = coco_masks()
    flat = [polygon.reshape(-1).tolist() for polygon in polygons]
    return mask.decode(mask.merge(mask.frPyObjects(flat, height, width)))


def compress(rle: dict[str, Any], height: int, width: int) -> bytes:
    """Checks run lengths in either of COCO's two forms, and returns the compressed form.

    Args:
        rle: A dict with `size`, [height, width], and `counts`, which is a list of lengths or COCO's
            compressed text.
        height: The height that the mask must have.
        width: The width that the mask must have.

    Raises: ValueError: if the run lengths do not describe a mask of this size.
    """
    mask = coco_masks()
    counts, size = rle.get("counts"), rle.get("size")
    if not isinstance(size, list) or size != [height, width]:
        raise ValueError(f"run lengths of size {size}, the image has {[height, width]}")
    if isinstance(counts, list):
        if not all(isinstance(count, int) and count >= 0 for count in counts):
            raise ValueError("invalid run lengths")
        if sum(counts) != height * width:
            raise ValueError(f"run lengths that cover {sum(counts)} pixels")
        return bytes(mask.frPyObjects({"counts": counts, "size": size}, height, width)["counts"])
    if not isinstance(counts, (str, bytes)):
        raise ValueError("run lengths that are neither a list nor a string")
    packed = counts.encode() if isinstance(counts, str) else counts
    try:
        mask.decode({"size": size, "counts": packed})
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"run lengths that cannot be read: {error}") from error
    return packed


def decompress(counts: bytes, height: int, width: int) -> NDArray:
    """Returns the mask that compressed run lengths describe, (height, width) uint8, 0 or 1.

    Args:
        counts: The run lengths as COCO's compressed text, encoded to bytes.
        height: Height of the mask.
        width: Width of the mask.
    """
    return coco_masks().decode({"size": [height, width], "counts": counts})


def encode(masks: NDArray[np.uint8]) -> list[dict[str, Any]]:
    """Encodes masks (n, H, W), 0 or 1, as COCO's compressed run lengths.

    Returns: for each mask {"size": [H, W], "counts": run lengths as text}; [] if there are no
        masks.
    """
    if not len(masks):
        return []
    columns = np.asfortranarray(masks.transpose(1, 2, 0))
    return [
        {"size": [int(side) for side in rle["size"]], "counts": bytes(rle["counts"]).decode()}
        for rle in coco_masks().encode(columns)
    ]
