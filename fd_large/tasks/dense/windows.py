"""Sliding windows over an image: their positions, and the mean of their predictions.

Source: mmsegmentation, encoder_decoder.py (slide_inference); a test compares both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Window = tuple[int, int, int, int]
"""Top, left, bottom and right of a window, in pixels; bottom and right are exclusive."""


def windows(size: tuple[int, int], crop: tuple[int, int], stride: tuple[int, int]) -> list[Window]:
    """Returns the windows of an image, row by row.

    The last window of a row or column is moved back to the border of the image. Along a side of the
    image that is shorter than the crop, there is one window, with the length of this side.

    Args:
        size: Height and width of the image.
        crop: Height and width of a window.
        stride: Distance between neighbouring windows, vertically and horizontally.
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


def mean_of_windows(
    image: Tensor,
    find: Callable[[Tensor], Tensor],
    places: Sequence[Window],
    *,
    at_once: int = 1,
) -> Tensor:
    """Averages the predictions of each pixel over all windows that contain it.

    Args:
        image: (B, 3, H, W).
        find: The model, which maps crops (B, 3, h, w) to predictions (B, ..., h, w).
        places: The windows, which all have the same size.
        at_once: Largest number of windows in a forward.

    Returns: (B, ..., H, W), with NaN for pixels that no window contains.
    """
    size = (image.shape[-2], image.shape[-1])
    total: Tensor | None = None
    count = torch.zeros(size, device=image.device)
    for start in range(0, len(places), at_once):
        some = places[start : start + at_once]
        crops = torch.cat([image[..., a:c, b:d] for a, b, c, d in some])
        for (a, b, c, d), prediction in zip(some, find(crops).split(len(image)), strict=True):
            if total is None:
                total = prediction.new_zeros(*prediction.shape[:-2], *size)
            total[..., a:c, b:d] += prediction
            count[a:c, b:d] += 1
    assert total is not None
    return total / count.to(total.dtype)


def num_forwards(places: Sequence[Window], at_once: int) -> int:
    """Returns how many forwards `mean_of_windows` runs for `places`, `at_once` windows each."""
    return -(-len(places) // at_once)
