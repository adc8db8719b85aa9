"""Plots of depth: an image beside its predicted depth, and rows of test images with the error.

Torch is not imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fd_large.files import unlinked
from fd_large.report.style import GREY, LIGHT_GREY, own_look
from fd_large.tasks.dense.headings import shortened

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.image import AxesImage

# Perceptual colour maps; near pixels are bright.
DEPTH_COLORS, ERROR_COLORS = "viridis_r", "coolwarm"
# A colour bar spans these percentiles; its pointed ends stand for values beyond them.
PERCENTILES = (1.0, 99.0)
# Inches, and the greatest height over width of an image in a row.
ROW_WIDTH, HEADING, LEAST_HEIGHT = 13.0, 0.32, 1.2
TALLEST = 1.4
# Widths of an image, of a colour bar with its numbers, and of the bar itself.
IMAGE, BAR, BAR_ITSELF = 1.0, 0.2, 0.18


class Row(NamedTuple):
    """A row of a plot: a test image with its true and predicted depths and its scores.

    Attributes:
        image: (H, W, 3) uint8.
        truth: (H, W), true depths in metres; 0 where the depth is unknown.
        predicted: (H, W), predicted depths in metres.
        scored: (H, W), whether each pixel is scored.
        name: The image's file name.
        found: Scores of the image, as text.
    """

    image: NDArray[np.uint8]
    truth: NDArray[np.floating[Any]]
    predicted: NDArray[np.floating[Any]]
    scored: NDArray[np.bool_]
    name: str
    found: str


@own_look
def draw_prediction(image: NDArray[np.uint8], depth: NDArray[np.floating[Any]], path: Path) -> None:
    """Writes a PNG of an image and its depth side by side, with a colour bar.

    Args:
        image: (H, W, 3) uint8.
        depth: (H, W), in metres.
        path: File to write.
    """
    from matplotlib.figure import Figure

    tall = 5.0
    wide = min(max(tall * image.shape[1] / image.shape[0], 2.0), 9.0)
    bar = 0.9
    whole = 2 * wide + bar
    figure = Figure(figsize=(whole, tall), dpi=max(100, round(image.shape[0] / tall)))
    places = [figure.add_axes((i * (wide + 0.04) / whole, 0, wide / whole, 1)) for i in (0, 1)]
    places[0].imshow(image)
    drawn = _depth(places[1], depth, _range(depth))
    for place in places:
        place.set_axis_off()
    _bar(figure.add_axes(((2 * wide + 0.14) / whole, 0.05, 0.14 / whole, 0.85)), drawn, "m")
    figure.savefig(unlinked(path))


@own_look
def draw_rows(rows: Sequence[Row], path: Path) -> None:
    """Writes the PNG `path` with a row for each image: image, true depth, predicted depth, error.

    True and predicted depths of an image have the same colour scale. The error is drawn only at
    scored pixels.
    """
    from matplotlib.figure import Figure

    widths = (IMAGE, IMAGE, IMAGE, BAR, IMAGE, BAR)
    column = ROW_WIDTH / (sum(widths) + 0.2)
    shapes = [min(row.image.shape[0] / row.image.shape[1], TALLEST) for row in rows]
    heights = [max(column * shape, LEAST_HEIGHT) + HEADING for shape in shapes]
    figure = Figure(figsize=(ROW_WIDTH, sum(heights)), dpi=110)
    places = figure.subplots(
        len(rows),
        len(widths),
        squeeze=False,
        gridspec_kw={
            "width_ratios": widths,
            "height_ratios": heights,
            "wspace": 0.03,
            "hspace": HEADING * len(rows) / sum(heights),
        },
    )
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - HEADING / sum(heights))
    for row, axes in zip(rows, places, strict=True):
        known = row.truth > 0
        limits = _range(row.truth[known])
        axes[0].imshow(row.image)
        _depth(axes[1], np.where(known, row.truth, np.nan), limits)
        depth = _depth(axes[2], row.predicted, limits)
        error = np.where(row.scored, row.predicted - row.truth, np.nan)
        most = max(abs(side) for side in _range(error))
        wrong = _image(axes[4], error, ERROR_COLORS, (-most, most))
        titles = (
            shortened(row.name),
            "true depth",
            f"predicted: {row.found}",
            "",
            "predicted - true",
            "",
        )
        for place, title in zip(axes, titles, strict=True):
            place.set_title(title, fontsize=9, loc="left", pad=3)
            place.set_axis_off()
            place.set_anchor("NW")
        for place, drawn in ((axes[3], depth), (axes[5], wrong)):
            inside = place.inset_axes((0, 0.06, BAR_ITSELF, 0.9))
            _bar(inside, drawn, "m")
    figure.savefig(unlinked(path))


def _range(values: NDArray[np.floating[Any]]) -> tuple[float, float]:
    """Returns the lower and the upper end of a colour scale, the `PERCENTILES` of finite `values`.

    If no value is finite, the ends are 0 and 1. If both percentiles are equal, the upper end is
    0.001 above the lower end.
    """
    known = values[np.isfinite(values)]
    low, high = np.percentile(known, PERCENTILES) if known.size else (0.0, 1.0)
    return (float(low), float(high)) if low < high else (float(low), float(low) + 1e-3)


def _depth(axes: Axes, depth: NDArray[np.floating[Any]], limits: tuple[float, float]) -> AxesImage:
    return _image(axes, depth, DEPTH_COLORS, limits)


def _image(
    axes: Axes, values: NDArray[np.floating[Any]], colors: str, limits: tuple[float, float]
) -> AxesImage:
    import matplotlib

    shown = matplotlib.colormaps[colors].with_extremes(bad=LIGHT_GREY)
    low, high = limits
    return axes.imshow(np.ma.masked_invalid(values), cmap=shown, vmin=low, vmax=high)


def _bar(axes: Axes, drawn: AxesImage, unit: str) -> None:
    bar = axes.figure.colorbar(drawn, cax=axes, extend="both")
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=8, colors=GREY, length=2)
    bar.ax.set_title(unit, fontsize=8, color=GREY, loc="left")
