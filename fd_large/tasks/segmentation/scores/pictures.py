"""Plots of segmentation: predictions over an image, rows of test images, the confusion matrix.

Torch is not imported.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fd_large.files import unlinked
from fd_large.report.style import GREY, LIGHT_GREY, own_look
from fd_large.tasks.dense.headings import shortened
from fd_large.tasks.segmentation.data.classes import Classes

if TYPE_CHECKING:
    from matplotlib.axes import Axes

OPACITY = 0.6
# Number of classes that a legend names, most pixels first, and the height of its lines in inches.
NAMED, LINE = 12, 0.2
# Number of classes in the confusion matrix, those with most wrong pixels.
CONFUSED = 20
# Inches, and the greatest height over width of an image in a row.
ROW_WIDTH, HEADING, LEAST_HEIGHT = 13.0, 0.3, 2.0
TALLEST = 1.4


class Row(NamedTuple):
    """A row of a plot: a test image with its labels, its prediction and its score.

    Attributes:
        image: (H, W, 3) uint8.
        labels: (H, W), the class of each pixel; negative for ignored pixels.
        predicted: (H, W), the predicted class of each pixel.
        name: The image's file name.
        found: Share of correct pixels, as text.
    """

    image: NDArray[np.uint8]
    labels: NDArray[np.integer]
    predicted: NDArray[np.integer]
    name: str
    found: str


def painted(
    image: NDArray[np.uint8], classes: NDArray[np.integer], of: Classes
) -> NDArray[np.uint8]:
    """Returns an image (H, W, 3) uint8 that is overlaid with the colours of its pixels' classes.

    Args:
        image: (H, W, 3) uint8.
        classes: (H, W), the class of each pixel. Pixels with a negative class stay unchanged.
        of: Colours of the classes.
    """
    colors = np.array(of.colors, dtype=np.float32)[np.maximum(classes, 0)]
    shown = image.astype(np.float32)
    inside = classes >= 0
    shown[inside] += OPACITY * (colors - shown)[inside]
    return shown.astype(np.uint8)


@own_look
def draw_prediction(
    image: NDArray[np.uint8], predicted: NDArray[np.integer], of: Classes, path: Path
) -> list[tuple[str, float]]:
    """Writes a PNG of an image that is overlaid with the predicted classes, with a legend.

    Args:
        image: (H, W, 3) uint8.
        predicted: (H, W), the predicted class of each pixel.
        of: Names and colours of the classes.
        path: File to write.

    Returns: (name, share of the pixels in 0..1) of each predicted class, largest share first.
    """
    from matplotlib.figure import Figure

    height, width = image.shape[:2]
    tall = 6.0
    wide = min(max(tall * width / height, 2.0), 14.0)
    legend = 2.6
    figure = Figure(figsize=(wide + legend, tall), dpi=max(100, round(height / tall)))
    axes = figure.add_axes((0, 0, wide / (wide + legend), 1))
    axes.imshow(painted(image, predicted, of))
    axes.set_axis_off()
    shares = _shares(predicted)
    names = [f"{of.names[number]} {100 * share:.0f}%" for number, share in shares]
    _legend(figure.add_axes((wide / (wide + legend), 0, 0, 1)), shares, names, of)
    figure.savefig(unlinked(path))
    return [(of.names[number], share) for number, share in shares]


@own_look
def draw_rows(rows: Sequence[Row], of: Classes, path: Path) -> None:
    """Writes the PNG `path` with a row for each image: image, labels, prediction, wrong pixels.

    Args:
        rows: The images.
        of: Names and colours of the classes.
        path: File to write.
    """
    from matplotlib.figure import Figure

    # A row is as high as its image, in columns of this width.
    column = ROW_WIDTH / 4.7
    shapes = [min(row.image.shape[0] / row.image.shape[1], TALLEST) for row in rows]
    heights = [max(column * shape, LEAST_HEIGHT) + HEADING for shape in shapes]
    figure = Figure(figsize=(ROW_WIDTH, sum(heights)), dpi=110)
    places = figure.subplots(
        len(rows),
        5,
        squeeze=False,
        gridspec_kw={
            "width_ratios": (1, 1, 1, 1, 0.62),
            "height_ratios": heights,
            "wspace": 0.03,
            "hspace": HEADING * len(rows) / sum(heights),
        },
    )
    figure.subplots_adjust(left=0.01, right=0.99, bottom=0.01, top=1 - HEADING / sum(heights))
    for row, axes, height in zip(rows, places, heights, strict=True):
        known = row.labels >= 0
        wrong = row.image.copy() // 3 + 160
        wrong[known & (row.labels != row.predicted)] = (204, 51, 17)
        shown = (
            (shortened(row.name), row.image),
            ("labels", painted(row.image, row.labels, of)),
            (f"prediction: {row.found}", painted(row.image, row.predicted, of)),
            ("wrong", wrong),
        )
        for (title, picture), place in zip(shown, axes, strict=False):
            place.imshow(picture)
            place.set_title(title, fontsize=9, loc="left", pad=3)
            place.set_axis_off()
            place.set_anchor("NW")
        both = np.concatenate([row.labels[known], row.predicted.ravel()])
        shares = _shares(both)
        # The last line gives the number of classes that are not named.
        named = min(NAMED, int((height - HEADING) / LINE) - 1)
        names = [of.names[number] for number, _ in shares]
        _legend(axes[-1], shares, names, of, named=named)
    figure.savefig(unlinked(path))


@own_look
def draw_confusion(counts: NDArray[np.int64], of: Classes, path: Path) -> None:
    """Writes a PNG of the confusion matrix, in per cent of the pixels with each label.

    Of more than `CONFUSED` classes, only those with most wrong pixels are shown.

    Args:
        counts: (K, K), the number of pixels by label (row) and prediction (column).
        of: Names of the classes.
        path: File to write.
    """
    from matplotlib.figure import Figure

    wrong = counts.sum(1) + counts.sum(0) - 2 * np.diagonal(counts)
    occurs = counts.sum(1) + counts.sum(0) > 0
    order = np.argsort(-wrong, kind="stable")
    shown = np.sort(order[occurs[order]][:CONFUSED])
    rest = len(shown) < np.count_nonzero(occurs)
    table = counts[np.ix_(shown, shown)]
    columns = [of.names[i] for i in shown]
    if rest:
        table = np.concatenate(
            [table, counts[shown].sum(1, keepdims=True) - table.sum(1, keepdims=True)], 1
        )
        columns.append("others")
    labelled = counts[shown].sum(1, keepdims=True)
    shares = 100 * table / np.maximum(labelled, 1)
    side = 2.6 + 0.38 * len(columns)
    figure = Figure(figsize=(side + 0.6, side), dpi=120, layout="constrained")
    axes = figure.subplots()
    drawn = axes.imshow(shares, cmap="Blues", vmin=0, vmax=100, aspect="auto")
    axes.set_xticks(range(len(columns)), columns, rotation=90, fontsize=8)
    axes.set_yticks(range(len(shown)), [of.names[i] for i in shown], fontsize=8)
    for row in range(shares.shape[0]):
        for column in range(shares.shape[1]):
            share = shares[row, column]
            if share >= 1:
                color = "white" if share > 50 else "black"
                axes.text(
                    column, row, f"{share:.0f}", ha="center", va="center", fontsize=7, color=color
                )
    axes.set_xlabel("prediction", fontsize=9)
    axes.set_ylabel("label", fontsize=9)
    title = "Share of a label's pixels by prediction, %"
    if rest:
        title += f"\n({len(shown)} classes with most wrong pixels)"
    axes.set_title(title, fontsize=10, loc="left")
    axes.tick_params(length=0)
    for spine in axes.spines.values():
        spine.set_color(LIGHT_GREY)
    figure.colorbar(drawn, ax=axes, fraction=0.04, pad=0.02).ax.tick_params(
        labelsize=8, colors=GREY
    )
    figure.savefig(unlinked(path))


def _shares(classes: NDArray[np.integer]) -> list[tuple[int, float]]:
    """Returns (class, share in 0..1) of each class that occurs, largest share first.

    The shares are those of the pixels with a class, which are the pixels with a number >= 0.
    """
    numbers, counts = np.unique(classes[classes >= 0], return_counts=True)
    order = np.argsort(-counts, kind="stable")
    return [(int(numbers[i]), float(counts[i] / counts.sum())) for i in order]


def _legend(
    axes: Axes,
    shares: Sequence[tuple[int, float]],
    names: Sequence[str],
    of: Classes,
    *,
    named: int = NAMED,
) -> None:
    from matplotlib.patches import Patch

    axes.set_axis_off()
    patches = [
        Patch(color=np.array(of.colors[number]) / 255, label=name)
        for (number, _), name in zip(shares[:named], names, strict=False)
    ]
    if len(shares) > named:
        patches.append(Patch(color="none", label=f"and {len(shares) - named} more"))
    axes.legend(handles=patches, loc="upper left", fontsize=9, frameon=False, borderaxespad=0.8)
