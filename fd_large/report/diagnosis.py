"""Draws the plots of a diagnosis from diagnosis.json and averages.npz alone."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median_low
from typing import TYPE_CHECKING, Any

import numpy

from fd_large.files import unlinked
from fd_large.report import style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLOURS = (style.BLUE, style.VERMILLION, style.GREEN, "#CC79A7", "#E69F00", "#56B4E9")
HEAT = "cividis"
NO_ATTENTION = "no attention layer\nof a known kind"
MOST_LAYERS = 5
DEEP = 3
"""One attention layer in three counts as deep, at the end of the model, as in the paper."""
NEARLY_UNIFORM = 0.1
"""Standard deviation of an average map, as a fraction of its mean, below which it is uniform.

The translation score of a nearly uniform map means little.
"""

MOST_STEEPER = 3
"""Largest factor between the loss changes of a model and the median model on a common scale.

A model whose loss changes more, or less, by a larger factor has a scale of its own.
"""

Model = dict[str, Any]
Landscape = dict[str, Any]


@style.own_look
def draw_diagnosis(folder: Path, diagnosis: dict[str, Any]) -> list[Path]:
    """Draws every plot for which there are numbers; returns the paths of the PNGs.

    Args:
        folder: Folder of averages.npz, to which the plots are written.
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
            figure.savefig(unlinked(drawn[-1]))
    return drawn


def deep_layers(layers: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Returns the deepest third of a model's attention layers, at least one.

    Args:
        layers: The model's layers from the first to the last.
    """
    return layers[len(layers) - max(1, len(layers) // DEEP) :]


def kinds_of(models: list[Model]) -> list[str]:
    """Returns the names of the losses and accuracies whose landscapes the models have.

    The drift loss, which every model has, comes last.
    """
    losses = [part["loss"] for model in models for part in model["landscapes"]]
    # The last loss of a model is one that every model has.
    shared = [part["loss"] for part in models[0]["landscapes"]][-1:]
    return [*dict.fromkeys(kind for kind in losses if kind not in shared), *shared]


def landscape_of(model: Model, kind: str) -> Landscape | None:
    """Returns the landscape of a loss of a model, or None if the model lacks it.

    Args:
        model: The model's entry in diagnosis.json.
        kind: Name of the loss.
    """
    return next((part for part in model["landscapes"] if part["loss"] == kind), None)


def short(label: str) -> str:
    """Returns `label`, shortened in the middle to 30 characters if it is longer."""
    return label if len(label) <= 30 else f"{label[:14]}...{label[-13:]}"


# ------------------------------------------------------------------------------------------------


def _by_layer(
    models: list[Model], label: str, draw: Callable[[Axes, Model, str], None]
) -> Figure | None:
    """Returns a figure with a panel for each model, whose x axis is the attention layer.

    Args:
        models: The models.
        label: Label of the y axis.
        draw: Function that draws a model in its panel in a colour.

    Returns: the figure, or None if no model has attention layers.
    """
    from matplotlib.ticker import MaxNLocator

    if not any(model["attention"] for model in models):
        return None
    figure = style.new_figure(max(3.4 * len(models), 4.6) + 0.6, 3.1)
    axes = figure.subplots(1, len(models), sharey=True, squeeze=False)[0]
    for number, (panel, model) in enumerate(zip(axes, models, strict=True)):
        panel.set_title(short(model["label"]), fontsize=style.TITLE_SIZE, loc="left")
        style.plain_axes(panel)
        if not model["attention"]:
            panel.set_xticks([])
            panel.grid(visible=False)
            look = {"ha": "center", "va": "center", "color": style.GREY}
            panel.text(0.5, 0.5, NO_ATTENTION, transform=panel.transAxes, **look)
            continue
        draw(panel, model, COLOURS[number % len(COLOURS)])
        panel.margins(y=0.08)
        panel.set_xlim(0.5, len(model["attention"]) + 0.5)
        panel.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=8))
        panel.set_xlabel("layer", fontsize=style.TEXT_SIZE)
    axes[0].set_ylabel(label, fontsize=style.TEXT_SIZE)
    return figure


def _distance(models: list[Model], averages: Any, cka: Any) -> Figure | None:
    def draw(panel: Axes, model: Model, colour: str) -> None:
        layers = model["attention"]
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
    def draw(panel: Axes, model: Model, colour: str) -> None:
        layers = model["attention"]
        numbers = range(1, len(layers) + 1)
        deep = len(layers) - len(deep_layers(layers))
        panel.axvspan(
            deep + 0.5, len(layers) + 0.5, color=style.LIGHT_GREY, alpha=0.4, linewidth=0, zorder=0
        )
        for name, words, look in (
            ("head_similarity", "whole maps", "o-"),
            ("patch_similarity", "among patches", "o--"),
        ):
            values = [_nan(layer[name]) for layer in layers]
            inside = colour if name == "head_similarity" else "white"
            panel.plot(numbers, values, look, color=colour, markersize=4, mfc=inside, label=words)
        panel.set_ylim(0, 1.02)
        panel.legend(fontsize=style.SMALL_SIZE, frameon=False, loc="lower left")

    return _by_layer(models, "cosine between heads", draw)


def _score(models: list[Model], averages: Any, cka: Any) -> Figure | None:
    scores = [
        layer["translation_score"]
        for model in models
        for layer in (*model["attention"], *model["scratch"])
    ]
    lowest = min([0.0, *(score for score in scores if score is not None)])

    def draw(panel: Axes, model: Model, colour: str) -> None:
        for name, words, ink, look in (
            ("scratch", "random weights", style.GREY, "--"),
            ("attention", "the model", colour, "-"),
        ):
            layers = model[name]
            values = [_nan(layer["translation_score"]) for layer in layers]
            panel.plot(range(1, len(layers) + 1), values, look, color=ink)
            for number, (layer, value) in enumerate(zip(layers, values, strict=True), 1):
                uniform = _nan(layer["average_variation"]) < NEARLY_UNIFORM
                inside = "white" if uniform else ink
                panel.plot([number], [value], "o", color=ink, markerfacecolor=inside, markersize=5)
            if layers:
                panel.plot([], [], look, marker="o", color=ink, markersize=5, label=words)
        panel.set_ylim(lowest, 1.02)
        panel.legend(fontsize=style.SMALL_SIZE, frameon=False, loc="best")

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
            # A few keys with the attention of all queries would leave the others dark.
            most = numpy.percentile(average, 99.5)
            cell.imshow(average, cmap=HEAT, vmin=0, vmax=most, interpolation="nearest")
            cell.set_xticks([])
            cell.set_yticks([])
            score = model["attention"][number]["translation_score"]
            score_text = "" if score is None else f", score {score:z.2f}"
            cell.set_title(f"layer {number + 1}{score_text}", fontsize=style.SMALL_SIZE)
            window = model["attention"][number]["window"]
            cell.set_xlabel(f"keys ({window[0]} x {window[1]})", fontsize=style.SMALL_SIZE)
        cells[0].set_ylabel("queries", fontsize=style.SMALL_SIZE)
    return figure


def _cells(
    models: list[Model], *, height: float, of: str
) -> tuple[Figure, Iterator[tuple[Axes, int, dict[str, Any]]]]:
    """Makes a figure with a row of panels for each loss.

    The row of a loss has a panel for each model that has a landscape of this loss.

    Args:
        models: The models.
        height: Height of a row in inches.
        of: The entry of the landscapes that will be drawn. A loss is left out if this entry is
            empty for all models.

    Returns: the figure, and an iterator over (panel, index of the model, landscape).
    """
    rows = [
        [(n, part) for n, model in enumerate(models) if (part := landscape_of(model, kind))]
        for kind in kinds_of(models)
    ]
    rows = [row for row in rows if any(part[of] for _, part in row)]
    columns = max(map(len, rows))
    figure = style.new_figure(max(3.4 * columns, 4.6) + 0.6, height * len(rows))
    panels = figure.subplots(len(rows), columns, squeeze=False)

    def cells() -> Iterator[tuple[Axes, int, dict[str, Any]]]:
        for line, row in zip(panels, rows, strict=True):
            for panel in line[len(row) :]:
                panel.set_axis_off()
            for panel, (number, part) in zip(line, row, strict=False):
                label = short(models[number]["label"])
                panel.set_title(label, fontsize=style.SMALL_SIZE, loc="left")
                yield panel, number, part

    return figure, cells()


def _curves(models: list[Model], averages: Any, cka: Any) -> Figure:
    figure, cells = _cells(models, height=3.1, of="curves")
    for panel, number, landscape in cells:
        colour = COLOURS[number % len(COLOURS)]
        style.plain_axes(panel)
        for low, mean, high in _bands(landscape):
            panel.fill_between(landscape["steps"], low, high, color=colour, alpha=0.15, linewidth=0)
            panel.plot(landscape["steps"], mean, color=colour, linewidth=1.3)
        panel.plot([0], _own(landscape), "o", color=colour, markersize=5)
        low, high, note = _range(models, landscape, _bands, _own)
        _note(panel, note)
        panel.set_ylim(low - 0.04 * (high - low), high + 0.04 * (high - low))
        panel.set_xlabel("step, in norms of the weights", fontsize=style.TEXT_SIZE)
        panel.set_ylabel(landscape["loss"], fontsize=style.TEXT_SIZE)
    return figure


def changes(landscape: Landscape, along: list[list[float | None]]) -> numpy.ndarray:
    """Returns the difference of a loss along a curve from the unchanged model's, (batches, steps).

    Args:
        landscape: Landscape to which the curve belongs.
        along: The loss at each step of the curve, for each batch; None, which becomes NaN, where
            the loss overflowed.
    """
    return numpy.array(along, float) - own_losses(landscape)[:, None]


def own_losses(landscape: Landscape) -> numpy.ndarray:
    """Returns the loss of the model with its trained weights on each batch, (batches,).

    The loss is NaN for a batch on which it was not finite.
    """
    return numpy.array(landscape["value"], float)


def _bands(landscape: Landscape) -> list[numpy.ndarray]:
    """Returns the loss along each random direction as an array (3, steps) with an error band.

    The rows are mean - deviation, mean, and mean + deviation. The mean is that of the loss over
    batches. The deviation is the standard deviation over batches of the change of the loss from
    the trained weights, since the loss itself differs more from batch to batch; it is 0 for one
    batch.
    """
    loss, bands = _own(landscape), []
    for along in landscape["curves"]:
        change = changes(landscape, along)
        mean = loss + change.mean(0)
        spread = change.std(0, ddof=1) if len(change) > 1 else numpy.zeros_like(mean)
        bands.append(numpy.stack([mean - spread, mean, mean + spread]))
    return bands


def _own(landscape: Landscape) -> float:
    """Returns the loss of the model with its trained weights, averaged over batches.

    The result is NaN if the loss was not finite on a batch.
    """
    return float(own_losses(landscape).mean())


def _first(landscape: Landscape) -> float:
    """Returns the loss of the model with its trained weights on the first batch.

    The result is NaN if this loss was not finite.
    """
    return float(own_losses(landscape)[0])


def _map(landscape: Landscape) -> list[numpy.ndarray]:
    return [numpy.array(landscape["map"], float)]


def _surfaces(models: list[Model], averages: Any, cka: Any) -> Figure:
    figure, cells = _cells(models, height=3.4, of="map")
    for panel, _, landscape in cells:
        steps, (rows,) = landscape["map_steps"], _map(landscape)
        low, high, note = _range(models, landscape, _map, _first)
        _note(panel, note)
        # Values may exceed the range by rounding, which would leave holes in the picture.
        values = numpy.ma.masked_invalid(rows).clip(low, high)
        levels = numpy.linspace(low, high, 13)
        image = panel.contourf(steps, steps, values, levels, cmap=HEAT)
        panel.set_aspect("equal")
        panel.plot([0], [0], "+", color="white", markersize=8)
        panel.set_xlabel("first direction", fontsize=style.TEXT_SIZE)
        panel.set_ylabel("second direction", fontsize=style.TEXT_SIZE)
        panel.tick_params(colors=style.GREY, labelsize=style.SMALL_SIZE)
        bar = figure.colorbar(image, ax=panel, shrink=0.85, format="%.3g")
        bar.ax.tick_params(labelsize=style.SMALL_SIZE)
        bar.set_label(landscape["loss"], fontsize=style.SMALL_SIZE)
    return figure


def _note(panel: Axes, words: str) -> None:
    """Adds `words` as a further line to the title of a panel; does nothing if `words` is ""."""
    if words:
        title = f"{panel.get_title(loc='left')}\n{words}"
        panel.set_title(title, fontsize=style.SMALL_SIZE, loc="left")


def _range(
    models: list[Model],
    landscape: Landscape,
    values_of: Callable[[Landscape], list[numpy.ndarray]],
    own_of: Callable[[Landscape], float],
) -> tuple[float, float, str]:
    """Returns the range of the axis for a landscape, and a note.

    The range contains all finite values. Comparable landscapes have ranges of equal size, each
    placed around its model's own loss. A model whose loss changes much more or less than that of
    the median model has a range of its own, so that all plots are readable.

    Args:
        models: The models.
        landscape: The landscape.
        values_of: Function from a landscape to the arrays of values that are drawn.
        own_of: Function from a landscape to the loss of the unchanged model.

    Returns: the lowest value, the highest value, and the note on a range of its own, or "".
    """
    alike = [
        part
        for model in models
        for part in model["landscapes"]
        if all(part[name] == landscape[name] for name in ("loss", "comparable"))
    ]
    own_loss = own_of(landscape)
    own_ends = _ends(landscape, values_of, own_of)
    if own_ends is None:
        return (own_loss, own_loss + 1.0, "") if numpy.isfinite(own_loss) else (0.0, 1.0, "")
    known = [ends for part in alike if (ends := _ends(part, values_of, own_of))]
    middle = median_low(high - low for low, high in known)

    def shares(ends: tuple[float, float]) -> bool:
        height = ends[1] - ends[0]
        return middle / MOST_STEEPER <= height <= middle * MOST_STEEPER

    shared = [ends for ends in known if shares(ends)]
    low, high = min(low for low, _ in shared), max(high for _, high in shared)
    note = ""
    if not shares(own_ends):
        note = "own scale"
        if high > low:
            times = (own_ends[1] - own_ends[0]) / (high - low)
            note += f": {times:{',.0f' if times >= 10 else '.2g'}} times as large"
        low, high = own_ends
    return own_loss + low, own_loss + high if high > low else own_loss + low + 1.0, note


def _ends(
    landscape: Landscape,
    values_of: Callable[[Landscape], list[numpy.ndarray]],
    own_of: Callable[[Landscape], float],
) -> tuple[float, float] | None:
    """Returns the lowest and the highest change of the loss, or None if no loss is finite.

    Args:
        landscape: The landscape.
        values_of: Function from a landscape to the arrays of values that are drawn.
        own_of: Function from a landscape to the loss of the unchanged model.
    """
    changed = numpy.stack(values_of(landscape)) - own_of(landscape)
    finite = changed[numpy.isfinite(changed)]
    return (float(finite.min()), float(finite.max())) if len(finite) else None


def _likeness(models: list[Model], averages: Any, cka: dict[str, Any]) -> Figure | None:
    """Returns a figure of the CKA between the layers of every two models and within each model.

    The figure has a row and a column of panels for each model. Panels above the diagonal are left
    out, since they would repeat those below it.

    Args:
        models: The models' entries in diagnosis.json.
        averages: Not used.
        cka: {"layers": the names of each model's layers, "matrix": the CKA of all pairs of layers}.
            For an empty matrix, the result is None.
    """
    if not cka["matrix"]:
        return None
    from matplotlib.ticker import MaxNLocator

    whole = numpy.array(cka["matrix"], float)
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
    """Returns at most `MOST_LAYERS` of the indices `layers`.

    If there are more, they are chosen at equal distances, with the first and the last.
    """
    if len(layers) <= MOST_LAYERS:
        return layers
    return [layers[round(i * (len(layers) - 1) / (MOST_LAYERS - 1))] for i in range(MOST_LAYERS)]
