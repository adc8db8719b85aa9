"""Draws the losses of a run with their constant-prediction baselines, and the learning rate."""

from __future__ import annotations

from itertools import cycle
from pathlib import Path
from textwrap import fill

import numpy

from fd_large.files import unlinked
from fd_large.recipes.architectures import full_name
from fd_large.report import style
from fd_large.report.run_files import RunFiles

DASHES = (0, (4, 4))
LOOKS = ((style.VERMILLION, "o", DASHES), (style.GREEN, "s", (4, (4, 4))))
"""Colour, marker and dashes of each evaluated loss in turn; the dashes are for its baseline.

Two baselines of equal height are both visible, since the dashes of the second are in the gaps of
the first.
"""
TITLE_CHARACTERS = 78
"""Largest number of characters of a line of the title."""


@style.own_look
def draw_loss_curve(files: RunFiles, path: Path) -> bool:
    """Draws the loss curve of a run as a PNG.

    Skipped steps are left out, since their losses do not describe the weights.

    Returns: whether the run has finished a step, and the PNG was drawn.
    """
    counted = numpy.isfinite(files.loss)
    if not counted.any():
        return False
    from matplotlib.ticker import MaxNLocator

    title = fill(_title(files), TITLE_CHARACTERS)
    top = 0.2 + 0.2 * len(title.splitlines())
    figure = style.plot_figure(8.0, 4.6, left=0.9, right=0.35, bottom=0.5, top=top)
    upper, lower = figure.subplots(
        2, 1, sharex=True, gridspec_kw={"height_ratios": (4, 1), "hspace": 0.14}
    )
    updates, loss = files.updates[counted], files.loss[counted]
    smooth = smoothed(loss)
    upper.plot(updates, loss, color=style.BLUE, alpha=0.28, linewidth=0.8)
    upper.plot(updates, smooth, color=style.BLUE, linewidth=2, label="training")
    curves = [smooth, [numpy.percentile(loss, 99.5)]]

    last = int(files.updates[-1])
    constant_seen = False
    for name, (color, marker, dashes) in zip(files.losses, cycle(LOOKS)):
        steps, values = files.evaluated(name)
        upper.plot(
            steps,
            values,
            color=color,
            linewidth=1.5,
            marker=marker,
            markersize=5 if len(steps) <= 40 else 0,
            label=files.words(name),
            clip_on=False,
            zorder=3,
        )
        curves.append(values)
        last = max(last, int(steps[-1]))
        _, constants = files.evaluated(f"{name.removesuffix('_loss')}_best_constant")
        if len(constants):
            upper.axhline(constants[-1], color=color, linewidth=1.2, linestyle=dashes)
            curves.append(constants[-1:])
            constant_seen = True
    if constant_seen:
        label = "constant-prediction baseline of the same colour"
        upper.plot([], [], color=style.GREY, linewidth=1.2, linestyle=DASHES, label=label)

    values = numpy.concatenate([numpy.asarray(part, dtype=float) for part in curves])
    low, high = numpy.nanmin([*values, loss.min()]), numpy.nanmax(values)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    upper.set_ylim(low - margin, high + margin)
    style.short_numbers(upper, (-2, 4))
    upper.set_ylabel(files.words("loss"), fontsize=style.TEXT_SIZE)
    upper.set_title(title, fontsize=style.TITLE_SIZE, loc="left")
    # The legend is outside, since the curve of a short run goes from corner to corner.
    style.legend_below(figure, style.TEXT_SIZE)

    lower.plot(files.updates, files.learning_rate, color=style.GREY, linewidth=1.5)
    lower.set_ylim(0, 1.15 * (files.learning_rate.max() or 1.0))
    lower.set_ylabel("learning rate", fontsize=style.TEXT_SIZE)
    lower.set_xlabel("steps", fontsize=style.TEXT_SIZE)
    lower.set_xlim(0, last)
    lower.xaxis.set_major_locator(MaxNLocator(integer=True))
    lower.yaxis.set_major_locator(MaxNLocator(3))
    style.short_numbers(lower, (-2, 2))
    for axes in (upper, lower):
        style.plain_axes(axes)
        axes.yaxis.set_label_coords(-0.095, 0.5)
    figure.savefig(unlinked(path))
    return True


def smoothed(values: numpy.ndarray) -> numpy.ndarray:
    """Returns the moving average of `values` over a centred window, an array of the same length.

    The window has about a 25th of the values; it is narrower near the ends.
    """
    half = len(values) // 50
    sums = numpy.concatenate([[0.0], numpy.cumsum(values)])
    centre = numpy.arange(len(values))
    # The window has the same reach to both sides, so that a slope is not bent at the ends.
    reach = numpy.minimum(half, numpy.minimum(centre, len(values) - 1 - centre))
    return (sums[centre + reach + 1] - sums[centre - reach]) / (2 * reach + 1)


def _short(model: str) -> str:
    """Returns the part of the name `model` after the last `/`.

    The user's own model `module:FOLDER/file.py:NAME` thus becomes `file.py:NAME`.
    """
    return model.rpartition("/")[2]


def _title(files: RunFiles) -> str:
    student, frozen = files.recipe["student"], files.frozen_models
    name = _short(full_name(student))
    if not frozen:
        return f"{files.recipe['name']}: {name}, from {student.get('init') or 'random weights'}"
    names = [
        # Several teachers may have the same model, so they are shown by name.
        (key.removeprefix("teacher ") if files.recipe.get("teachers") else _short(full_name(model)))
        + " (random weights)" * (model["source"] == "random")
        for key, model in frozen.items()
    ]
    return f"{files.recipe['name']}: {name} learns from {', '.join(names)}"
