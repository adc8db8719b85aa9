"""The pictures of an evaluation: worst and chosen images beside the ground truth, and curves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fd_large.tasks.detection.scores.curves import draw_curves
from fd_large.tasks.detection.scores.drawing import compared_rows, draw_rows
from fd_large.tasks.detection.scores.mistakes import compare, worst
from fd_large.tasks.detection.scores.results import Result
from fd_large.tasks.detection.scores.scoring import Scores

IMAGES = 4


def draw_evaluation(
    ground_truth: Mapping[str, Any],
    results: Sequence[Result],
    scores: Scores,
    read: Callable[[int], NDArray[np.uint8]],
    folder: Path,
    *,
    chosen: Sequence[int] = (),
) -> list[Path]:
    """Draws worst.png, chosen.png and curves.png.

    Args:
        ground_truth: From `scoring.read_ground_truth`.
        results: With boxes.
        scores: Of these results.
        read: From an image id to pixels (H, W, 3) uint8.
        folder: Must be there.
        chosen: Image ids of chosen.png; empty: some that are spread evenly over the set, the same
            in every evaluation, so that these can be compared.

    Returns: what was drawn; worst.png is left out where nothing is wrong.
    """
    compared = compare(ground_truth, results)
    numbers = sorted(compared)
    if not chosen:
        spread = np.linspace(0, len(numbers) - 1, min(IMAGES, len(numbers))).round().astype(int)
        chosen = [numbers[place] for place in spread]
    drawn = []
    for name, images in (("worst", worst(compared, IMAGES)), ("chosen", chosen)):
        path = folder / f"{name}.png"
        if images:
            draw_rows(compared_rows(ground_truth, compared, images, read), path)
            drawn.append(path)
        else:  # an older evaluation's would be taken for this one's
            path.unlink(missing_ok=True)
    draw_curves(scores, folder / "curves.png")
    return [*drawn, folder / "curves.png"]
