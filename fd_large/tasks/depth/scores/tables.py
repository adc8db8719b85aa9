"""A table of depth scores for the terminal; torch is not imported."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from rich.table import Table

    from fd_large.tasks.depth.scores.evaluation import Outcome

MEANINGS = {
    "d1": "share of pixels within a factor of 1.25 of the true depth",
    "d2": "within a factor of 1.25 squared",
    "d3": "within a factor of 1.25 cubed",
    "abs_rel": "absolute error over true depth",
    "sq_rel": "squared error over true depth, m",
    "rmse": "root mean square error, m",
    "rmse_log": "root mean square error of the natural logarithms",
    "log10": "absolute error of the logarithms to base 10",
    "silog": "scale-invariant error of the natural logarithms, half of the squared mean taken away",
}
PARTS = {
    "none": "the whole image",
    "nyu": "rows 45 to 470, columns 41 to 600",
    "kitti_garg": "Garg's part of the image",
    "kitti_eigen": "Eigen's part of the image",
}


def numbers_table(outcome: Outcome) -> Table:
    """Returns a table of the nine scores, with the number of images and the crop in its title."""
    from rich.table import Table

    crop, left_out = outcome.scored.crop, outcome.without_depth + outcome.unread
    title = f"{int(outcome.scores.scored.sum()):,} images, crop {crop}: {PARTS[crop]}"
    if left_out:
        title += f"; {left_out:,} left out (unreadable, or without a scored depth)"
    table = Table(title=title, title_justify="left")
    for heading in ("", "mean over images", ""):
        table.add_column(heading, justify="right" if heading else "left")
    for name, value in outcome.scores.numbers().items():
        table.add_row(name, "-" if np.isnan(value) else f"{value:.4f}", MEANINGS[name])
    return table
