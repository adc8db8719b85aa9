"""The look of all plots: one scale of font sizes, colours that the colour-blind distinguish."""

from __future__ import annotations

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


def new_figure(width: float, height: float) -> Figure:
    """Makes an empty figure of so many inches, which lays itself out."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def plain_axes(axes: Axes) -> None:
    """Reduces a frame to the two sides that carry numbers, and a faint grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY, labelsize=SMALL_SIZE)
    axes.grid(axis="y", color=LIGHT_GREY, linewidth=0.6)
    axes.set_axisbelow(True)
