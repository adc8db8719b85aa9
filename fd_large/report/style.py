"""Style of all plots, with font sizes and with colours that colour-blind people can tell apart."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, ParamSpec, TypeVar

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


P = ParamSpec("P")
T = TypeVar("T")


def own_look(draw: Callable[P, T]) -> Callable[P, T]:
    """Returns a function that draws with matplotlib's defaults instead of the user's settings.

    Sizes are computed for the default font; with another font, legends could be cut off.

    Args:
        draw: The decorated function.
    """

    @functools.wraps(draw)
    def drawn(*args: P.args, **kwargs: P.kwargs) -> T:
        import matplotlib

        with matplotlib.rc_context():
            matplotlib.rcdefaults()
            return draw(*args, **kwargs)

    return drawn


def new_figure(width: float, height: float) -> Figure:
    """Returns an empty figure with automatic layout; its width and height are in inches."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained")


def plot_figure(
    width: float, height: float, *, left: float, right: float, bottom: float, top: float
) -> Figure:
    """Returns an empty figure with fixed margins; all lengths are in inches.

    The report of a run draws half a dozen figures by this function, since the automatic layout of
    `new_figure` takes as long as the drawing.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=DPI)
    figure.subplots_adjust(
        left=left / width, right=1 - right / width, bottom=bottom / height, top=1 - top / height
    )
    return figure


def legend_below(figure: Figure, size: float) -> None:
    """Adds a legend of the first axes' lines below the plot, and makes the figure higher for it.

    Args:
        figure: A figure of `plot_figure`.
        size: Font size in points.
    """
    lines, names = figure.axes[0].get_legend_handles_labels()
    width, height = figure.get_size_inches()
    half = math.ceil(len(names) / 2)
    letters = sum(max(map(len, part), default=0) for part in (names[:half], names[half:]))
    # Beside the samples of two lines; a letter is a little wider than half its height.
    columns = 2 if 1 + letters * 0.56 * size / 72 < width else 1
    room = 0.06 + math.ceil(len(names) / columns) * 1.6 * size / 72
    places = figure.subplotpars
    below, above = (place * height + room for place in (places.bottom, places.top))
    figure.set_figheight(height + room)
    figure.subplots_adjust(bottom=below / (height + room), top=above / (height + room))
    figure.legend(lines, names, fontsize=size, frameon=False, loc="lower left", ncols=columns)


def short_numbers(axes: Axes, powers: tuple[int, int], size: float = SMALL_SIZE) -> None:
    """Writes the numbers of the y axis with a common power of ten, which is above the axis.

    Args:
        axes: The axes.
        powers: Exponents (lowest, highest) of the powers of ten between which numbers are written
            in full.
        size: Font size of the power in points.
    """
    axes.ticklabel_format(axis="y", style="sci", scilimits=powers)
    axes.yaxis.get_offset_text().set(size=size, color=GREY)


def named_rows(axes: Axes, names: Sequence[str]) -> None:
    """Labels the heights 0, 1, 2 ... of the y axis with `names`, and adds vertical grid lines.

    Height 0 is on top, so that the plot has a row for each name in the order of `names`.
    """
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(len(names) - 0.5, -0.6)
    plain_axes(axes)
    axes.grid(axis="x", color=LIGHT_GREY, linewidth=0.6)
    axes.grid(visible=False, axis="y")
    axes.tick_params(axis="y", labelsize=TEXT_SIZE, length=0)


def plain_axes(axes: Axes) -> None:
    """Removes the top and right sides of the axes' frame, and adds faint horizontal grid lines."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(GREY)
    axes.tick_params(colors=GREY, labelsize=SMALL_SIZE)
    axes.grid(axis="y", color=LIGHT_GREY, linewidth=0.6)
    axes.set_axisbelow(True)
