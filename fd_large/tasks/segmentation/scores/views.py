"""How a test sees an image: whole or by sliding windows, at several sizes, mirrored or not.

Source: mmsegmentation, encoder_decoder.py (slide_inference) and seg_tta.py; their oracles hold
this to them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

Logits = Callable[[Tensor], Tensor]
"""Maps a crop (B, 3, h, w) to logits (B, K, h, w)."""
Window = tuple[int, int, int, int]
"""Top, left, bottom and right, in pixels."""


def windows(size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]) -> list[Window]:
    """Returns the windows of an image, row by row.

    The last one of a row or column is moved back to the border. A side that is smaller than the
    crop has one window, of the side itself.

    Args:
        size: Height and width of the image.
        crop: Height and width of a window.
        stride: Distance from window to window, down and across.
    """
    starts = []
    for length, side, step in zip(size, crop, stride, strict=True):
        count = max(length - side + step - 1, 0) // step + 1
        starts.append([max(min(i * step, length - side), 0) for i in range(count)])
    (height, width), (rows, columns) = size, crop
    return [
        (top, left, min(top + rows, height), min(left + columns, width))
        for top in starts[0]
        for left in starts[1]
    ]


def slide(
    image: Tensor,
    logits_of: Logits,
    *,
    crop: tuple[int, int],
    stride: tuple[int, int],
    at_once: int = 1,
) -> Tensor:
    """Averages the logits of all windows over each pixel.

    Args:
        image: (B, 3, H, W).
        logits_of: The model.
        crop: Height and width of a window.
        stride: Distance from window to window.
        at_once: Number of windows in a forward.

    Returns: (B, K, H, W).
    """
    size = (image.shape[-2], image.shape[-1])
    places = windows(size, crop, stride)
    total: Tensor | None = None
    count = image.new_zeros(size)
    for some in _batches(places, at_once):
        crops = torch.cat([image[..., a:c, b:d] for a, b, c, d in some])
        for (a, b, c, d), seen in zip(some, logits_of(crops).split(len(image)), strict=True):
            if total is None:
                total = seen.new_zeros(*seen.shape[:2], *size)
            total[..., a:c, b:d] += seen
            count[a:c, b:d] += 1
    assert total is not None
    return total / count.to(total.dtype)


def num_forwards(
    size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int], at_once: int
) -> int:
    """Returns how many forwards `slide` makes of an image."""
    return -(-len(windows(size, crop, stride)) // at_once)


def averaged(views: Iterable[tuple[Tensor, bool]], size: tuple[int, int]) -> Tensor:
    """Averages the class probabilities of several views of one image.

    Args:
        views: Logits (B, K, h, w) of each view, and whether it was mirrored.
        size: Height and width of the result.

    Returns: (B, K, H, W), probabilities.
    """
    total: Tensor | None = None
    count = 0
    for logits, mirrored in views:
        own = resized(logits.flip(-1) if mirrored else logits, size).softmax(dim=1)
        total = own if total is None else total.add_(own)
        count += 1
    assert total is not None
    return total / count


def resized(logits: Tensor, size: tuple[int, int]) -> Tensor:
    """Resizes logits (B, K, h, w) to (B, K, H, W), bilinear."""
    return F.interpolate(logits, size=size, mode="bilinear", align_corners=False)


def _batches(places: list[Window], at_once: int) -> Iterator[list[Window]]:
    for start in range(0, len(places), at_once):
        yield places[start : start + at_once]
