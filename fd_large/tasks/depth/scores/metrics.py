"""Nine depth scores of each image; the scores of a dataset are means over its images.

The scores of an image are computed in float64 on the host of one rank, and averaged in the order of
the images, so that the means do not depend on the number of ranks.

Source: MIM-Depth-Estimation (metrics.py, as in GLPDepth and BTS); a test compares the scores.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fd_large.errors import ConfigError

NAMES = ("d1", "d2", "d3", "abs_rel", "sq_rel", "rmse", "rmse_log", "log10", "silog")
RATIO = 1.25
SILOG_LAMBDA = 0.5

Crop = Literal["none", "nyu", "kitti_garg", "kitti_eigen"]
# NYUv2's images have black borders; in pixels.
NYU_SIZE = (480, 640)
NYU_ROWS, NYU_COLUMNS = (45, 471), (41, 601)
# Shares of height and width.
KITTI = {
    "kitti_garg": ((0.40810811, 0.99189189), (0.03594771, 0.96405229)),
    "kitti_eigen": ((0.3324324, 0.91351351), (0.0359477, 0.96405229)),
}


class Scored(NamedTuple):
    """The rule that decides which pixels of an image are scored.

    Attributes:
        limits: Two depths in metres. A pixel is scored if its true depth is strictly between them.
        crop: Name of the part of the image that is scored (`crop_of`).
    """

    limits: tuple[float, float]
    crop: Crop = "none"

    def pixels(self, truth: NDArray[np.floating[Any]]) -> NDArray[np.bool_]:
        """Returns a mask (H, W) of the pixels of an image that are scored.

        Args:
            truth: (H, W), true depths in metres; 0 where the depth is unknown.
        """
        return scored_pixels(truth, self.limits, crop_of(self.crop, *truth.shape))


def scored_pixels(
    truth: NDArray[np.floating[Any]], limits: tuple[float, float], part: tuple[slice, slice]
) -> NDArray[np.bool_]:
    """Returns a mask (H, W): True for pixels in `part` whose true depth is within `limits`.

    Args:
        truth: (H, W), true depths in metres; 0 where the depth is unknown.
        limits: Two depths in metres; a depth must be strictly between them.
        part: Rows and columns of the part.
    """
    # Compared in the precision of the depths, in which 1 mm in a file is not above 0.001 m.
    low, high = (truth.dtype.type(limit) for limit in limits)
    inside = np.zeros(truth.shape, bool)
    inside[part] = True
    return inside & (truth > low) & (truth < high)


def crop_of(name: Crop, height: int, width: int) -> tuple[slice, slice]:
    """Returns the rows and the columns of an image that are inside a named crop.

    Args:
        name: Name of the crop; "none" for the whole image.
        height: Height of the image, in pixels.
        width: Width of the image, in pixels.

    Raises: ConfigError: if the crop is defined for images of another size.
    """
    if name == "none":
        return slice(None), slice(None)
    if name == "nyu":
        if (height, width) != NYU_SIZE:
            raise ConfigError(
                "task.depth.test_crop: nyu is a crop of NYUv2's images; got an image of "
                f"{height} x {width} pixels, expected {NYU_SIZE[0]} x {NYU_SIZE[1]}. Set "
                "--task.depth.test_crop none."
            )
        return slice(*NYU_ROWS), slice(*NYU_COLUMNS)
    (top, bottom), (left, right) = KITTI[name]
    return (
        slice(int(top * height), int(bottom * height)),
        slice(int(left * width), int(right * width)),
    )


def finite_depths(
    predicted: NDArray[np.floating[Any]], limits: tuple[float, float]
) -> NDArray[np.float64]:
    """Returns predicted depths as float64 without infinities and NaN.

    Positive and negative infinity become the upper limit, and NaN becomes the lower limit. Finite
    depths are not clamped, as in the published code.

    Args:
        predicted: Predicted depths in metres.
        limits: Lower and upper limit in metres.
    """
    low, high = limits
    return np.nan_to_num(predicted.astype(np.float64), nan=low, posinf=high, neginf=high)


def image_scores(
    predicted: NDArray[np.floating[Any]], truth: NDArray[np.floating[Any]]
) -> NDArray[np.float64]:
    """Returns the nine scores of an image, (9,) float64, in the order of `NAMES`.

    Args:
        predicted: (n,), predicted depths of the scored pixels in metres; n is at least 1.
        truth: (n,), true depths of the same pixels, in metres.
    """
    p, t = predicted.astype(np.float64), truth.astype(np.float64)
    difference = p - t
    # A depth of 0 has the logarithm -inf, which makes scores infinite or NaN.
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = np.maximum(p / t, t / p)
        logarithms = np.log(p) - np.log(t)
        mean, mean_square = logarithms.mean(), np.square(logarithms).mean()
        return np.array(
            [
                *((ratio < RATIO**power).mean() for power in (1, 2, 3)),
                (np.abs(difference) / t).mean(),
                (np.square(difference) / t).mean(),
                np.sqrt(np.square(difference).mean()),
                np.sqrt(mean_square),
                np.abs(logarithms).mean() / np.log(10),
                np.sqrt(mean_square - SILOG_LAMBDA * mean**2),
            ]
        )


class Scores(NamedTuple):
    """The scores of a dataset's N images.

    Attributes:
        of_images: (N, 9) float64, scores in the order of `NAMES`; NaN for images not scored.
        pixels: (N,) int64, the number of scored pixels of each image.
    """

    of_images: NDArray[np.float64]
    pixels: NDArray[np.int64]

    @property
    def scored(self) -> NDArray[np.bool_]:
        """A mask (N,) of the images that are scored because they have at least one scored pixel."""
        return self.pixels > 0

    def numbers(self) -> dict[str, float]:
        """Returns {name: mean of a score over the scored images}; NaN if no image is scored."""
        rows = self.of_images[self.scored]
        means = rows.mean(0) if len(rows) else np.full(len(NAMES), np.nan)
        return dict(zip(NAMES, means.tolist(), strict=True))
