"""The look of all plots: one scale of font sizes, colours that the colour-blind distinguish."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's palette, "Color Universal Design", 2008.
BLUE = "#0072B2"
VERMILLION = "#D55E00"
GREEN = "#009E73"
GREY = "#5f5f5f"
LIGHT_GREY = "#d9d9d9"

DPI = 150
TITLE_SIZE = 12
TEXT_SIZE = 10
SMALL_SIZE = 9
LEGEND_COLUMNS = 2


def new_figure(width: float, height: float) -> Figure:
    """Makes an empty figure of so many inches, which lays itself out."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def plot_figure(width: float, height: float, *, left: float, bottom: float, top: float) -> Figure:
    """Makes an empty figure of so many inches, and of margins in inches.

    Every run ends with half a dozen of them, and to lay one out takes as long as to draw it.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI)
    figure.subplots_adjust(
        left=left / width, right=1 - 0.15 / width, bottom=bottom / height, top=1 - top / height
    )
    return figure


def legend_below(figure: Figure, size: float) -> None:
    """Names the first axes' lines below all axes of a `plot_figure`, which it makes room for."""
    lines, names = figure.axes[0].get_legend_handles_labels()
    rows = math.ceil(len(names) / LEGEND_COLUMNS)
    room = (0.06 + rows * 1.6 * size / 72) / figure.get_figheight()
    figure.subplots_adjust(bottom=figure.subplotpars.bottom + room)
    figure.legend(
        lines, names, fontsize=size, frameon=False, loc="lower left", ncols=LEGEND_COLUMNS
    )


def plain_axes(axes: Axes) -> None:
    """Reduces a frame to the two sides that carry numbers, and a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY, labelsize=SMALL_SIZE)
    axes.grid(axis="y", color=LIGHT_GREY, linewidth=0.6)
    axes.set_axisbelow(True)
