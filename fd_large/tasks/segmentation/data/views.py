"""Views of an image: random crops in training, and the whole image at several sizes in tests."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fd_large.data.random_numbers import uniforms
from fd_large.tasks.dense.geometry import View, resized_view
from fd_large.tasks.dense.windows import Window, num_forwards, windows
from fd_large.tasks.segmentation.data import photometric
from fd_large.tasks.segmentation.loss import IGNORED

# Largest number of crops that are drawn while a single class fills them; the last is always used.
CROPS = 11
NUM_DRAWS = 2 + 2 * CROPS  # scale, flip, and top and left of each crop
FLIP_PROBABILITY = 0.5

Drawn = tuple[Sequence[float], Sequence[float]]
# The longer side is at most this many times the crop's: 2048 for 512.
LONG_SIDE = 4


class TrainingViews(NamedTuple):
    """Random resizing, cropping, mirroring and colour distortion of training images.

    Source: the published segmentation runs of Swin, BEiT and MAE on ADE20K.

    Attributes:
        image_size: Side of the square crop, in pixels; views of small images are smaller.
        scale_range: Smallest and largest scale. At scale 1 the shorter side of the resized image
            equals `image_size`, or less if the longer side would exceed `LONG_SIDE * image_size`.
        cat_max_ratio: Another crop is drawn, up to `CROPS` in all, if one class has at least this
            share of the crop's labelled pixels, or if no pixel is labelled. 1 accepts every crop.
        photometric: Whether colours are changed (`photometric.distort`).
    """

    image_size: int
    scale_range: tuple[float, float]
    cat_max_ratio: float
    photometric: bool

    @property
    def unknown(self) -> np.int16:
        """The label of a pixel of the padding, outside the view: `IGNORED`."""
        return np.int16(IGNORED)

    def draws(self, seed: int, epoch: int, positions: NDArray[np.int64]) -> list[Drawn]:
        """Returns the random numbers for the view at each position of the epoch.

        Args:
            seed: The run's seed.
            epoch: Epoch, counted from 0.
            positions: (B,), positions in the epoch's order.
        """
        crops = uniforms(seed, epoch, positions, "jitter", NUM_DRAWS).tolist()
        colors = uniforms(seed, epoch, positions, "color", photometric.NUM_DRAWS).tolist()
        return list(zip(crops, colors, strict=True))

    def view(
        self, image: Tensor, labels: NDArray[np.int16], drawn: Drawn
    ) -> tuple[Tensor, NDArray[np.int16]]:
        """Returns a random crop of an image, (3, h, w) uint8, and of its labels, (h, w).

        Args:
            image: (3, H, W) uint8.
            labels: (H, W), the class of each pixel, or `IGNORED`.
            drawn: An item of `draws`: `NUM_DRAWS` uniform random numbers for the crop, and
                `photometric.NUM_DRAWS` for the colours.
        """
        (draw_scale, draw_flip, *corners), colors = drawn
        low, high = self.scale_range
        scale = low + (high - low) * draw_scale
        short, long = int(self.image_size * scale), int(LONG_SIDE * self.image_size * scale)
        size = (image.shape[-2], image.shape[-1])
        whole = resized_view(*size, short_side=max(short, 1), long_side=max(long, 1))
        rows, columns = (min(side, self.image_size) for side in whole.resized)
        for number in range(CROPS):
            top = int(corners[2 * number] * (whole.resized[0] - rows + 1))
            left = int(corners[2 * number + 1] * (whole.resized[1] - columns + 1))
            crop = (top, left, rows, columns)
            view = View(size, whole.resized, crop, draw_flip < FLIP_PROBABILITY)
            crop_labels = view.numbers(labels)
            if self.cat_max_ratio == 1 or _is_mixed(crop_labels, self.cat_max_ratio):
                break
        pixels = view.image(image)
        if self.photometric:
            changed = photometric.distort(pixels.permute(1, 2, 0).numpy(), colors)
            pixels = torch.from_numpy(changed).permute(2, 0, 1).contiguous()
        return pixels, crop_labels


def _is_mixed(labels: NDArray[np.int16], largest: float) -> bool:
    """Whether at least two classes occur in a crop, each with a share of less than `largest`.

    Ignored pixels do not count.

    Args:
        labels: (h, w), the class of each pixel, or `IGNORED`.
        largest: A share of the labelled pixels, in 0..1.
    """
    counts = np.bincount(labels[labels != IGNORED])
    return np.count_nonzero(counts) > 1 and counts.max() / counts.sum() < largest


class TestViews(NamedTuple):
    """The sizes at which an image is tested, whole or by windows.

    Attributes:
        short_side: Length of the shorter side at scale 1, in pixels.
        long_side: Upper limit of the longer side at scale 1.
        scales: Factors of `short_side` and `long_side`, one for each view.
        flip: Whether the model also sees each view mirrored.
        crop: Side of a window, in pixels; 0 for whole images.
        stride: Distance from window to window, in pixels.
    """

    # No test of pytest's.
    __test__ = False

    short_side: int
    long_side: int
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    crop: int = 0
    stride: int = 0

    def views(self, height: int, width: int) -> list[View]:
        """Returns the view of an image for each scale, without mirrored views.

        In a test by windows, the shorter side of a view is at least `crop`, and the longer side has
        no upper limit.

        Args:
            height: Height of the image, in pixels.
            width: Width of the image, in pixels.
        """
        views = []
        for scale in self.scales:
            short, long = int(self.short_side * scale), int(self.long_side * scale)
            if self.crop:
                short, long = max(short, self.crop), max(height, width) * max(short, self.crop)
            views.append(resized_view(height, width, short_side=short, long_side=long))
        return views

    def num_forwards(self, height: int, width: int, at_once: int) -> int:
        """Returns the number of forwards for an image.

        Args:
            height: Height of the image, in pixels.
            width: Width of the image, in pixels.
            at_once: Largest number of windows in a forward.
        """
        of_scales = (
            num_forwards(self.windows(*view.size), at_once) if self.crop else 1
            for view in self.views(height, width)
        )
        return sum(of_scales) * (2 if self.flip else 1)

    def windows(self, height: int, width: int) -> list[Window]:
        """Returns the windows by which a view is tested.

        Args:
            height: Height of the view, in pixels.
            width: Width of the view, in pixels.
        """
        return windows((height, width), (self.crop,) * 2, (self.stride,) * 2)
