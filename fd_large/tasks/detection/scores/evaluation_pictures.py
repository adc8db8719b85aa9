"""Plots of an evaluation: images with true and detected objects, and precision-recall curves.

Torch is not imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fd_large.files import unlinked
from fd_large.report.style import own_look
from fd_large.tasks.detection.scores.annotated_images import compared_rows, draw_rows
from fd_large.tasks.detection.scores.error_analysis import compare, worst
from fd_large.tasks.detection.scores.results import Result
from fd_large.tasks.detection.scores.scoring import CURVES, Scores

NUM_IMAGES = 4
# Okabe and Ito's palette, "Color Universal Design", 2008.
CURVE_COLOURS = ("#0072B2", "#D55E00")
GREY, LIGHT_GREY = "#5f5f5f", "#d9d9d9"
AP_NAMES = {0.5: "AP50", 0.75: "AP75"}


def draw_evaluation(
    ground_truth: Mapping[str, Any],
    results: Sequence[Result],
    scores: Scores,
    read: Callable[[int], NDArray[np.uint8]],
    folder: Path,
) -> list[Path]:
    """Draws worst.png and chosen.png with images and detections, and curves.png.

    worst.png shows the images with most errors. chosen.png shows images that are spread evenly over
    the dataset, and are the same in every evaluation, for comparison.

    Args:
        ground_truth: Result of `scoring.read_ground_truth`.
        results: Detections in COCO's format, with boxes.
        scores: The scores of these detections.
        read: Maps an image id to the image's pixels, (H, W, 3) uint8.
        folder: A folder that exists.

    Returns: the paths of the plots; worst.png is not drawn if there are no errors.
    """
    compared = compare(ground_truth, results)
    numbers = sorted(compared)
    spread = np.linspace(0, len(numbers) - 1, min(NUM_IMAGES, len(numbers))).round().astype(int)
    chosen = [numbers[place] for place in spread]
    drawn = []
    for name, images in (("worst", worst(compared, NUM_IMAGES)), ("chosen", chosen)):
        path = folder / f"{name}.png"
        if images:
            draw_rows(compared_rows(ground_truth, compared, images, read), path)
            drawn.append(path)
        else:  # The file of an older evaluation would be taken for this one's.
            path.unlink(missing_ok=True)
    draw_curves(scores, folder / "curves.png")
    return [*drawn, folder / "curves.png"]


@own_look
def draw_curves(scores: Scores, path: Path) -> None:
    """Writes the PNG `path` with curves of precision against recall, for boxes and for masks.

    Each has a curve for every IoU in `CURVES`. Masks are left out if `scores` has none.
    """
    from matplotlib.figure import Figure

    kinds = scores.kinds
    figure = Figure(figsize=(4.1 * len(kinds) + 0.3, 4.0), dpi=150, layout="constrained")
    figure.get_layout_engine().set(wspace=0.05)
    panels = figure.subplots(1, len(kinds), squeeze=False, sharey=True)[0]
    for axes, (kind, of_kind) in zip(panels, kinds.items(), strict=True):
        for colour, iou in zip(CURVE_COLOURS, CURVES, strict=True):
            curve = of_kind.curves[iou]
            axes.plot(
                [place / 100 for place in range(len(curve))],
                curve,
                color=colour,
                linewidth=2,
                label=f"IoU {iou}: {AP_NAMES[iou]} {of_kind.numbers[AP_NAMES[iou]]:.3f}",
            )
        axes.set_title(f"{kind}, AP {of_kind.numbers['AP']:.3f}", fontsize=12)
        axes.set_xlabel("recall", fontsize=10)
        axes.set_xlim(0, 1)
        axes.set_ylim(0, 1.02)
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(GREY)
        axes.tick_params(colors=GREY, labelsize=9)
        axes.grid(color=LIGHT_GREY, linewidth=0.6)
        axes.legend(fontsize=9, frameon=False, loc="best")
    panels[0].set_ylabel("precision, mean over classes", fontsize=10)
    figure.savefig(unlinked(path))
