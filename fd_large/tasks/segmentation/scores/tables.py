"""Tables of segmentation scores for the terminal; torch is not imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from fd_large.tasks.segmentation.scores.areas import Scores

if TYPE_CHECKING:
    from rich.table import Table

MEANINGS = {
    "mIoU": "mean over classes of intersection over union",
    "mAcc": "mean over classes of the share of correct pixels",
    "aAcc": "share of correct pixels among all",
}


def numbers_table(scores: Scores, num_images: int) -> Table:
    """Returns a table of mIoU, mAcc and aAcc in per cent, titled with the number of images."""
    from rich.table import Table

    table = Table(title=f"{num_images:,} images", title_justify="left")
    for heading in ("", "%", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for name, value in scores.numbers().items():
        table.add_row(name, _shown(value), MEANINGS[name])
    return table


def classes_table(scores: Scores, names: tuple[str, ...]) -> Table:
    """Returns a table of IoU, accuracy (both in per cent) and labelled pixels of each class.

    Classes that occur in neither labels nor predictions are left out.

    Args:
        scores: The scores of the dataset.
        names: The name of each class.
    """
    from rich.table import Table

    table = Table(title="The classes that occur", title_justify="left")
    for heading in ("class", "IoU", "Acc", "pixels"):
        table.add_column(heading, justify="left" if heading == "class" else "right")
    labelled = scores.counts.sum(1)
    for number in np.flatnonzero(~np.isnan(scores.iou)):
        values = _shown(scores.iou[number]), _shown(scores.acc[number])
        table.add_row(names[number], *values, f"{labelled[number]:,}")
    return table


def _shown(value: float) -> str:
    return "-" if np.isnan(value) else f"{value:.2f}"
