"""Draws boxes, masks and class names on images, for ground truth and detections, without torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fd_large.files import unlinked
from fd_large.report.style import own_look
from fd_large.tasks.detection.data import masks
from fd_large.tasks.detection.scores.error_analysis import LEAST_IOU, LEAST_SCORE, Compared

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# Okabe and Ito's palette without black, then its colours lightened or darkened.
COLOURS = (
    "#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7",
    "#FFD27A", "#A9DCF7", "#5FD3B0", "#8AC4E8", "#FF9E5E", "#E9B8D3",
)  # fmt: skip
MASK_OPACITY = 0.45
# In inches; a high image is shown smaller than a wide one.
ROW_WIDTH, GAP, HEADING, FOOT, TALLEST = 11.0, 0.1, 0.28, 0.4, 1.2
SMALL_AREA = 32**2


class Mark(NamedTuple):
    """An object or a detection to draw.

    Attributes:
        box: Left, top, width and height, in pixels.
        label: The text at the box.
        colour: The colour of box and mask.
        mask: (H, W) uint8, 0 or 1; None to draw no mask.
        wrong: Whether the object was missed, or the detection is false. The box is then dashed.
    """

    box: Sequence[float]
    label: str
    colour: str
    mask: NDArray[np.uint8] | None
    wrong: bool


class Row(NamedTuple):
    """A row of a plot: an image with its true objects, and again with its detections.

    Attributes:
        image: (H, W, 3) uint8.
        title: The text above the image.
        truth: The true objects.
        seen: The detections.
    """

    image: NDArray[np.uint8]
    title: str
    truth: list[Mark]
    seen: list[Mark]


def compared_rows(
    ground_truth: Mapping[str, Any],
    compared: Mapping[int, Compared],
    image_ids: Sequence[int],
    read: Callable[[int], NDArray[np.uint8]],
) -> list[Row]:
    """Returns the row of each image in `image_ids`, for `draw_rows`.

    Args:
        ground_truth: Result of `scoring.read_ground_truth`.
        compared: Result of `error_analysis.compare`.
        image_ids: Ids of the images, in the order of the rows.
        read: Maps an image id to the image's pixels, (H, W, 3) uint8.
    """
    names = {category["id"]: category["name"] for category in ground_truth["categories"]}
    colours = {number: COLOURS[place % len(COLOURS)] for place, number in enumerate(sorted(names))}
    files = {image["id"]: image.get("file_name", image["id"]) for image in ground_truth["images"]}

    rows = []
    for number in image_ids:
        image, of_image = read(number), compared[number]
        sides = [
            [
                Mark(
                    entry["bbox"],
                    names[entry["category_id"]]
                    + (f" {entry['score']:.2f}" if "score" in entry else ""),
                    colours[entry["category_id"]],
                    _mask(entry.get("segmentation"), *image.shape[:2]),
                    wrong,
                )
                for entry, wrong in zip(entries, wrongs, strict=True)
            ]
            for entries, wrongs in (
                (of_image.objects, of_image.missed),
                (of_image.seen, of_image.false),
            )
        ]
        title = (
            f"{files[number]}: {sum(of_image.missed)} of {len(of_image.objects)} missed, "
            f"{sum(of_image.false)} false"
        )
        rows.append(Row(image, title, *sides))
    return rows


def marks_of(detections: Sequence[Mapping[str, Any]]) -> list[Mark]:
    """Returns a mark for each detection in an image, with a colour for each class.

    Args:
        detections: Dicts with `class` (name of the class), and with `bbox`, `score`, and optionally
            `segmentation` as in COCO's results format.
    """
    classes = sorted({entry["class"] for entry in detections})
    return [
        Mark(
            entry["bbox"],
            f"{entry['class']} {entry['score']:.2f}",
            COLOURS[classes.index(entry["class"]) % len(COLOURS)],
            _mask(entry["segmentation"], *entry["segmentation"]["size"])
            if entry.get("segmentation")
            else None,
            wrong=False,
        )
        for entry in detections
    ]


@own_look
def draw_rows(rows: Sequence[Row], path: Path) -> None:
    """Writes the PNG `path` with a row for each image: left true objects, right detections."""
    from matplotlib.figure import Figure

    column = (ROW_WIDTH - 3 * GAP) / 2
    heights = [min(column * r.image.shape[0] / r.image.shape[1], TALLEST * column) for r in rows]
    total = sum(heights) + HEADING * len(rows) + FOOT
    figure = Figure(figsize=(ROW_WIDTH, total), dpi=110)
    above = total
    for row, height in zip(rows, heights, strict=True):
        above -= HEADING + height
        for place, (heading, marks) in enumerate(
            ((row.title, row.truth), (f"detections from score {LEAST_SCORE}", row.seen))
        ):
            left = GAP + place * (column + GAP)
            axes = figure.add_axes(
                (left / ROW_WIDTH, above / total, column / ROW_WIDTH, height / total)
            )
            draw_marks(axes, row.image, marks)
            axes.set_anchor("W")
            axes.set_title(heading, fontsize=9, loc="left", pad=3)
    figure.text(
        GAP / ROW_WIDTH,
        0.12 / total,
        f"Left ground truth, right detections from score {LEAST_SCORE}; dashed: missed or false at "
        f"box IoU {LEAST_IOU}. Crowds are not drawn.",
        fontsize=9,
        color="#5f5f5f",
    )
    figure.savefig(unlinked(path))


@own_look
def draw_image(image: NDArray[np.uint8], marks: Sequence[Mark], path: Path) -> None:
    """Writes the PNG `path`, an image (H, W, 3) uint8 with marks drawn on it, at its own size."""
    from matplotlib.figure import Figure

    height, width = image.shape[:2]
    dpi = 100
    figure = Figure(figsize=(width / dpi, height / dpi), dpi=dpi)
    draw_marks(figure.add_axes((0, 0, 1, 1)), image, marks)
    figure.savefig(unlinked(path))


def draw_marks(axes: Axes, image: NDArray[np.uint8], marks: Sequence[Mark]) -> None:
    """Draws an image with marks into a plot's axes, small objects over large objects.

    Args:
        axes: Axes of Matplotlib.
        image: (H, W, 3) uint8.
        marks: The objects or detections to draw.
    """
    from matplotlib.colors import to_rgb
    from matplotlib.patches import Rectangle

    marks = sorted(marks, key=lambda mark: -mark.box[2] * mark.box[3])
    shown = image.astype(np.float32)
    for mark in marks:
        if mark.mask is not None:
            inside = mark.mask.astype(bool)
            colour = np.array(to_rgb(mark.colour), dtype=np.float32) * 255
            shown[inside] += MASK_OPACITY * (colour - shown[inside])
    axes.imshow(shown.astype(np.uint8))
    for mark in marks:
        left, top, width, height = mark.box
        style = "--" if mark.wrong else "-"
        for colour, line in (("black", 2.6), (mark.colour, 1.4)):
            edge = {"edgecolor": colour, "linewidth": line, "linestyle": style}
            axes.add_patch(Rectangle((left, top), width, height, fill=False, **edge))
        axes.text(
            max(left, 0),
            max(top, 0),
            mark.label,
            fontsize=7 if width * height > SMALL_AREA else 5,
            color="black",
            verticalalignment="top",
            bbox={"facecolor": mark.colour, "edgecolor": "none", "pad": 0.8, "alpha": 0.8},
            clip_on=True,
        )
    axes.set_xlim(0, image.shape[1])
    axes.set_ylim(image.shape[0], 0)
    axes.set_axis_off()


def _mask(segmentation: Any, height: int, width: int) -> NDArray[np.uint8] | None:
    if isinstance(segmentation, list) and segmentation:
        polygons = [np.array(polygon, dtype=float).reshape(-1, 2) for polygon in segmentation]
        return masks.from_polygons(polygons, height, width)
    if isinstance(segmentation, dict):
        return masks.decompress(masks.compress(segmentation, height, width), height, width)
    return None
