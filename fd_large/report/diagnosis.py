"""Draws a diagnosis, models side by side, from diagnosis.json and averages.npz alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy

from fd_large.report import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (style.BLUE, style.VERMILLION, style.GREEN, "#CC79A7", "#E69F00", "#56B4E9")
HEAT = "cividis"
NO_ATTENTION = "no attention layer\nof a known kind"
MOST_LAYERS = 5
NEARLY_UNIFORM = 0.1
"""Spread of an average map over its mean, below which there is little for a score to explain."""

Model = dict[str, Any]


def draw_diagnosis(folder: Path, diagnosis: dict[str, Any]) -> list[Path]:
    """Draws every figure for which there are numbers; returns the PNGs.

    Args:
        folder: Holds averages.npz and takes the pictures.
        diagnosis: Content of diagnosis.json.
    """
    models = diagnosis["models"]
    with numpy.load(folder / "averages.npz") as arrays:
        averages = {name: arrays[name] for name in arrays.files}
    drawn = []
    for name, draw in _PICTURES.items():
        figure = draw(models, averages, diagnosis["cka"])
        if figure is not None:
            drawn.append(folder / f"{name}.png")
            figure.savefig(drawn[-1])
    return drawn


def short(label: str) -> str:
    """Returns a label that fits over a panel."""
    return label if len(label) <= 30 else f"{label[:14]}...{label[-13:]}"


# ------------------------------------------------------------------------------------------------


def _panels(models: list[Model], *, height: float, share: bool) -> tuple[Figure, list[Axes]]:
    figure = style.new_figure(max(3.4 * len(models), 4.6) + 0.6, height)
    axes = figure.subplots(1, len(models), sharey=share, squeeze=False)[0]
    for panel, model in zip(axes, models, strict=True):
        panel.set_title(short(model["label"]), fontsize=style.TITLE_SIZE, loc="left")
    return figure, list(axes)


def _by_layer(
    models: list[Model], label: str, draw: Callable[[Axes, list[dict[str, Any]], str], None]
) -> Figure | None:
    """Draws a panel for each model: something over its attention layers."""
    from matplotlib.ticker import MaxNLocator

    if not any(model["attention"] for model in models):
        return None
    figure, axes = _panels(models, height=3.1, share=True)
    for number, (panel, model) in enumerate(zip(axes, models, strict=True)):
        style.plain_axes(panel)
        if not model["attention"]:
            panel.set_xticks([])
            panel.grid(visible=False)
            look = {"ha": "center", "va": "center", "color": style.GREY}
            panel.text(0.5, 0.5, NO_ATTENTION, transform=panel.transAxes, **look)
            continue
        draw(panel, model["attention"], COLOURS[number % len(COLOURS)])
        panel.margins(y=0.08)
        panel.set_xlim(0.5, len(model["attention"]) + 0.5)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        panel.set_xlabel("layer", fontsize=style.TEXT_SIZE)
    axes[0].set_ylabel(label, fontsize=style.TEXT_SIZE)
    return figure


def _distance(models: list[Model], averages: Any, cka: Any) -> Figure | None:
    def draw(panel: Axes, layers: list[dict[str, Any]], colour: str) -> None:
        for number, layer in enumerate(layers, 1):
            heads = layer["distance_pixels"]
            panel.plot([number] * len(heads), heads, "o", color=colour, markersize=4, alpha=0.45)
        means = [sum(layer["distance_pixels"]) / layer["heads"] for layer in layers]
        panel.plot(range(1, len(layers) + 1), means, color=colour, linewidth=1.5)

    figure = _by_layer(models, "attention distance, pixels", draw)
    if figure is not None:
        figure.axes[0].set_ylim(bottom=0)
    return figure


def _similarity(models: list[Model], averages: Any, cka: Any) -> Figure | None:
    def draw(panel: Axes, layers: list[dict[str, Any]], colour: str) -> None:
        values = [_nan(layer["head_similarity"]) for layer in layers]
        panel.plot(range(1, len(layers) + 1), values, "o-", color=colour, markersize=4)
        panel.set_ylim(0, 1.02)

    return _by_layer(models, "cosine between heads", draw)


def _score(models: list[Model], averages: Any, cka: Any) -> Figure | None:
    def draw(panel: Axes, layers: list[dict[str, Any]], colour: str) -> None:
        values = [_nan(layer["translation_score"]) for layer in layers]
        panel.plot(range(1, len(layers) + 1), values, color=colour)
        for number, (layer, value) in enumerate(zip(layers, values, strict=True), 1):
            uniform = _nan(layer["average_variation"]) < NEARLY_UNIFORM
            inside = "white" if uniform else colour
            panel.plot([number], [value], "o", color=colour, markerfacecolor=inside, markersize=5)
        panel.set_ylim(min(0, numpy.nanmin([0, *values])), 1.02)

    return _by_layer(models, "translation score", draw)


def _average(models: list[Model], averages: dict[str, numpy.ndarray], cka: Any) -> Figure | None:
    rows = [
        (model, [n for n in range(len(model["attention"])) if _key(i, n) in averages], i)
        for i, model in enumerate(models)
    ]
    rows = [(model, _spread(layers), i) for model, layers, i in rows if layers]
    if not rows:
        return None
    columns = max(len(layers) for _, layers, _ in rows)
    figure = style.new_figure(max(1.9 * columns, 4.6), 2.35 * len(rows) + 0.2)
    parts = figure.subfigures(len(rows), 1, squeeze=False)[:, 0]
    for part, (model, layers, i) in zip(parts, rows, strict=True):
        part.suptitle(short(model["label"]), fontsize=style.TITLE_SIZE, x=0.01, ha="left")
        cells = part.subplots(1, columns, squeeze=False)[0]
        for cell in cells:
            cell.set_axis_off()
        for cell, number in zip(cells, layers, strict=False):
            cell.set_axis_on()
            average = averages[_key(i, number)]
            # A few keys that all look at would leave the rest in the dark.
            most = numpy.percentile(average, 99.5)
            cell.imshow(average, cmap=HEAT, vmin=0, vmax=most, interpolation="nearest")
            cell.set_xticks([])
            cell.set_yticks([])
            score = model["attention"][number]["translation_score"]
            said = "" if score is None else f", score {score:z.2f}"
            cell.set_title(f"layer {number + 1}{said}", fontsize=style.SMALL_SIZE)
            window = model["attention"][number]["window"]
            cell.set_xlabel(f"keys ({window[0]} x {window[1]})", fontsize=style.SMALL_SIZE)
        cells[0].set_ylabel("queries", fontsize=style.SMALL_SIZE)
    return figure


def _curves(models: list[Model], averages: Any, cka: Any) -> Figure:
    kinds = {model["landscape"]["loss"] for model in models}
    figure, axes = _panels(models, height=3.4, share=len(kinds) == 1)
    for number, (panel, model) in enumerate(zip(axes, models, strict=True)):
        seen, colour = model["landscape"], COLOURS[number % len(COLOURS)]
        style.plain_axes(panel)
        for values in seen["curves"]:
            panel.plot(seen["steps"], [_nan(v) for v in values], color=colour, linewidth=1.3)
        panel.plot([0], [seen["value"]], "o", color=colour, markersize=5)
        low, high = _range(models, seen["loss"], lambda of: of["curves"])
        panel.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
        panel.set_xlabel("step, in lengths of the weights", fontsize=style.TEXT_SIZE)
        if number == 0 or len(kinds) > 1:
            panel.set_ylabel(f"loss: {seen['loss']}", fontsize=style.SMALL_SIZE)
    return figure


def _surfaces(models: list[Model], averages: Any, cka: Any) -> Figure:
    figure, axes = _panels(models, height=3.5, share=True)
    for panel, model in zip(axes, models, strict=True):
        seen = model["landscape"]
        steps = seen["map_steps"]
        rows = numpy.array([[_nan(v) for v in row] for row in seen["map"]])
        levels = numpy.linspace(*_range(models, seen["loss"], lambda of: of["map"]), 13)
        image = panel.contourf(steps, steps, numpy.ma.masked_invalid(rows), levels, cmap=HEAT)
        panel.set_aspect("equal")
        panel.set_title(short(model["label"]), fontsize=style.TEXT_SIZE, loc="left")
        panel.plot([0], [0], "+", color="white", markersize=8)
        panel.set_xlabel("first direction", fontsize=style.TEXT_SIZE)
        panel.tick_params(colors=style.GREY, labelsize=style.SMALL_SIZE)
        bar = figure.colorbar(image, ax=panel, shrink=0.85, format="%.3g")
        bar.ax.tick_params(labelsize=style.SMALL_SIZE)
        bar.set_label(f"loss: {seen['loss']}", fontsize=style.SMALL_SIZE)
    axes[0].set_ylabel("second direction", fontsize=style.TEXT_SIZE)
    return figure


def _range(
    models: list[Model], loss: str, rows_of: Callable[[dict[str, Any]], list[list[float | None]]]
) -> tuple[float, float]:
    """Returns the range of the landscapes of one kind of loss, which share a scale."""
    of_kind = [m["landscape"] for m in models if m["landscape"]["loss"] == loss]
    known = [v for of in of_kind for row in rows_of(of) for v in row if v is not None]
    low, high = (min(known), max(known)) if known else (0.0, 1.0)
    return low, high if high > low else low + 1.0


def _likeness(models: list[Model], averages: Any, cka: dict[str, Any]) -> Figure | None:
    """Draws every pair of models, a model with itself included, below the diagonal."""
    if not cka["matrix"]:
        return None
    from matplotlib.ticker import MaxNLocator

    whole = numpy.array([[_nan(v) for v in row] for row in cka["matrix"]])
    ends = numpy.cumsum([0, *(len(names) for names in cka["layers"])])
    count = len(models)
    side = 2.9 if count > 1 else 3.6
    figure = style.new_figure(side * count + 0.9, side * count + 0.4)
    cells = figure.subplots(count, count, squeeze=False)
    image = None
    for row in range(count):
        for column in range(count):
            cell = cells[row][column]
            if column > row:
                cell.set_axis_off()
                continue
            part = whole[ends[row] : ends[row + 1], ends[column] : ends[column + 1]]
            image = cell.imshow(
                part, cmap=HEAT, vmin=0, vmax=1, origin="lower", aspect="auto",
                extent=(0.5, part.shape[1] + 0.5, 0.5, part.shape[0] + 0.5),
                interpolation="nearest",
            )  # fmt: skip
            cell.tick_params(colors=style.GREY, labelsize=style.SMALL_SIZE)
            for axis in (cell.xaxis, cell.yaxis):
                axis.set_major_locator(MaxNLocator(integer=True, nbins=8))
            if row == count - 1:
                cell.set_xlabel(f"{short(models[column]['label'])}\nblock", fontsize=9)
            if column == 0:
                cell.set_ylabel(f"{short(models[row]['label'])}\nblock", fontsize=9)
    bar = figure.colorbar(image, ax=cells, shrink=0.6, label="linear CKA")
    bar.ax.tick_params(labelsize=style.SMALL_SIZE)
    return figure


_PICTURES: dict[str, Callable[..., Figure | None]] = {
    "attention_distance": _distance,
    "head_similarity": _similarity,
    "average_attention": _average,
    "translation_score": _score,
    "landscape": _curves,
    "landscape_map": _surfaces,
    "cka": _likeness,
}


def _key(model: int, layer: int) -> str:
    return f"model_{model}_layer_{layer}"


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _spread(layers: list[int]) -> list[int]:
    """Returns the first, the last and some between."""
    if len(layers) <= MOST_LAYERS:
        return layers
    return [layers[round(i * (len(layers) - 1) / (MOST_LAYERS - 1))] for i in range(MOST_LAYERS)]
