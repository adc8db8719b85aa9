"""Makes a table and a plot of the accuracies of several models, from summary.json alone."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fd_large.files import unlinked
from fd_large.report import style

if TYPE_CHECKING:
    from rich.table import Table

MARK = "*"
"""Mark of a row or cell whose recipe differs from the first row's."""
COLORS = (style.BLUE, style.VERMILLION, style.GREEN, style.GREY)


def spread(values: list[float]) -> dict[str, float | None]:
    """Returns the entries `mean` and `standard_deviation` of `values`, one value for each seed.

    The standard deviation is None for a single seed.
    """
    deviation = statistics.stdev(values) if len(values) > 1 else None
    return {"mean": statistics.fmean(values), "standard_deviation": deviation}


def tables_of(summary: dict[str, Any], title: str) -> list[Table]:
    """Returns the table with a row for each model, and the table of a sweep, if there was one.

    Args:
        summary: Content of summary.json.
        title: Title of the table, which says how accuracy was measured.
    """
    swept = [model for model in summary["nets"] if "sweep" in model]
    return [_accuracies(summary, title), *([_grid(swept)] if swept else [])]


def _accuracies(summary: dict[str, Any], title: str) -> Table:
    from rich.table import Table
    from rich.text import Text

    first = summary["nets"][0]
    several = len(first["accuracy"]) > 1
    table = Table(
        title=f"{title}: accuracy, per cent of the test images",
        title_justify="left",
    )
    table.add_column("model", overflow="fold")
    trained, swept = "recipe" in first, "sweep" in first
    if trained:
        table.add_column("recipe", overflow="fold")
    if swept:
        table.add_column("rate", justify="right")
        table.add_column("decay", justify="right")
    table.add_column("pixels", justify="right")
    table.add_column("mean" if several else "accuracy", justify="right")
    if several:
        table.add_column("+-", justify="right")
        table.add_column("seeds", justify="right", overflow="fold")
    if compared := any("difference" in model for model in summary["nets"]):
        table.add_column("minus the first", overflow="fold")
    for model in summary["nets"]:
        mark = f" {MARK}" if model.get("unlike_first") else ""
        cells = [Text(model["label"]), *([Text(model["recipe"] + mark)] if trained else [])]
        if swept:
            cells += [f"{model['sweep'][name]:g}" for name in ("base_lr", "layer_decay")]
        cells += [str(model["image_size"]), f"{model['mean']:.2f}"]
        if several:
            cells.append(f"{model['standard_deviation']:.2f}")
            cells.append(" ".join(f"{value:.2f}" for value in model["accuracy"]))
        if compared:
            difference = model.get("difference")
            cells.append(shown(difference) if difference else "")
        table.add_row(*cells)
    differences = [model["difference"] for model in summary["nets"] if "difference" in model]
    lines = []
    if "constant_accuracy" in summary:  # Earlier versions did not record it.
        lines.append(
            f"Always predicting the most common class scores {summary['constant_accuracy']:.2f}."
        )
    lines += said_of(differences)
    lines += [
        f"{MARK} {model['label']}: other settings than the first row (its values in brackets): "
        f"{in_words(model['unlike_first'])}."
        for model in summary["nets"]
        if model.get("unlike_first")
    ]
    table.caption, table.caption_justify = Text("\n".join(lines)), "left"
    return table


def seen_by(sweeps: Mapping[str, Mapping[str, Any]]) -> Iterator[str]:
    """Yields notes on models that were trained on the images that a sweep held out.

    Args:
        sweeps: {label of a row: the entry of its sweep in summary.json}.
    """
    trainings = {label: sweep["held_out_seen_by"] for label, sweep in sweeps.items()}
    for label, runs in trainings.items():
        if runs:
            yield (
                f"{label}: the held-out images that chose the settings were training images of "
                f"{', '.join(runs)}; such a choice is not fair to a row that never saw them."
            )
    if sweeps and not any(trainings.values()):
        yield (
            "As far as is known, no run that led to a model was trained on the images that "
            "chose the settings."
        )
    for label, sweep in sweeps.items():
        if weights := sweep.get("held_out_not_known"):
            unknown = ", ".join(weights)
            yield (
                f"{label}: it is not known whether these images were in the training of {unknown}."
            )


def said_of(differences: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Yields notes on what the intervals of differences mean.

    Args:
        differences: The entries of the differences in summary.json.
    """
    of_both = any(difference["over"] != "images" for difference in differences)
    if of_both:
        yield (
            "In brackets: the 95% interval of the difference over other test images and seeds. A "
            "difference is shown only if the interval excludes 0."
        )
    if any(difference["needs_seeds"] for difference in differences):
        yield (
            "One seed: in brackets is the 95% interval over other test images alone. The spread of "
            "seeds is not known, so no model is called better; --seeds 3 measures that spread."
        )
    elif differences and not of_both:
        yield (
            "In brackets: the 95% interval of the difference over other test images. A difference "
            "is shown only if the interval excludes 0. Nothing else is random here."
        )


def shown(difference: Mapping[str, Any], digits: int = 2) -> str:
    """Returns a difference and its interval as text, such as "+1.20 (+0.80 to +1.60)".

    If the interval includes 0, the text is "none shown (-0.20 to +0.60)". If the scores depend on a
    seed, but there is only one seed, it is "one seed: +1.20 (+0.80 to +1.60)" in both cases.

    Args:
        difference: The entry of the difference in summary.json.
        digits: Number of digits after the decimal point.
    """
    low, high = difference["interval"]
    mean = f"{difference['mean']:+.{digits}f}"
    words = mean if difference["is_shown"] else "none shown"
    if difference["needs_seeds"]:
        words = f"one seed: {mean}"
    return f"{words} ({low:+.{digits}f} to {high:+.{digits}f})"


def in_words(changes: Mapping[str, Sequence[Any]]) -> str:
    """Returns changed fields as text, "FIELD VALUE (OTHER VALUE), ...".

    Args:
        changes: {field: (OTHER VALUE, VALUE)}.
    """
    return ", ".join(
        f"{name} {_plain(value)} ({_plain(other)})" for name, (other, value) in changes.items()
    )


def _plain(value: Any) -> str:
    """Returns `value`, of a recipe's field, as text like on the command line.

    Items of a list are separated by spaces. None, "" and an empty list give "none".
    """
    if isinstance(value, list | tuple):
        return " ".join(map(_plain, value)) or "none"
    if isinstance(value, float):
        return f"{value:g}"
    return "none" if value in (None, "") else str(value)


def _grid(models: list[dict[str, Any]]) -> Table:
    """Returns the table of a sweep, with a column for each multiple of the learning rate.

    The table has a row for each model, recipe and layer decay.

    Args:
        models: The entries of the models in summary.json.
    """
    from rich.table import Table
    from rich.text import Text

    table = Table(
        title="Sweep: accuracy on the held-out tenth of the training images, per cent",
        title_justify="left",
        caption_justify="left",
    )
    table.add_column("model", overflow="fold")
    table.add_column("recipe", overflow="fold")
    table.add_column("decay", justify="right")
    rates = sorted({trial["rate"] for model in models for trial in model["sweep"]["trials"]})
    for rate in rates:
        table.add_column(f"rate x {rate:g}", justify="right")
    table.add_column("best")
    for model in models:
        sweep, of_point = model["sweep"], {}
        for trial in sweep["trials"]:
            of_rates = of_point.setdefault((trial["recipe"], trial["layer_decay"]), {})
            accuracy = trial["held_out_accuracy"]
            of_rates[trial["rate"]] = "diverged" if accuracy is None else f"{accuracy:.2f}"
        for (recipe, decay), of_rates in of_point.items():
            is_best = (recipe, decay) == (sweep["recipe"], sweep["layer_decay"])
            best = f"rate x {sweep['rate']:g}" if is_best else ""
            cells = [of_rates.get(rate, "") for rate in rates]
            table.add_row(Text(model["label"]), Text(recipe), f"{decay:g}", *cells, best)
    lines = [
        "Rates are multiples of the recipe's learning rate; the grid has the recipe's own rate (x "
        "1) and decay. The best setting of each model was then trained on all training images."
    ]
    lines += [
        f"{model['label']}: the best is at an edge of the grid "
        f"({' and '.join(model['sweep']['at_edge'])}); a wider grid may hold a better setting."
        for model in models
        if model["sweep"]["at_edge"]
    ]
    lines += seen_by({model["label"]: model["sweep"] for model in models})
    table.caption = Text("\n".join(lines))
    return table


@style.own_look
def draw_comparison(summary: dict[str, Any], title: str, path: Path) -> None:
    """Draws a row for each model, with a dot for each seed and a line at the mean.

    Args:
        summary: Content of summary.json.
        title: Title of the plot, which says how accuracy was measured.
        path: File of the plot.
    """
    models = summary["nets"]
    figure = style.new_figure(8.0, 1.6 + 0.5 * len(models))
    axes = figure.subplots()
    values = [value for model in models for value in model["accuracy"]]
    low, high = min(values), max(values)
    margin = max(0.12 * (high - low), 0.5)
    # Room for the numbers to the right of the dots, and to the left of those near 100.
    at_left = [max(model["accuracy"]) + 3 * margin > 100 for model in models]
    starts = [
        min(model["accuracy"]) - (3 if is_left else 1) * margin
        for model, is_left in zip(models, at_left, strict=True)
    ]
    left, right = max(0.0, min(starts)), min(100.0, high + 3 * margin)
    for row, model in enumerate(models):
        color = COLORS[row % len(COLORS)]
        axes.plot([model["mean"]] * 2, [row - 0.25, row + 0.25], color=color, linewidth=2.5)
        dots = axes.plot(model["accuracy"], [row] * len(model["accuracy"]), "o", color=color)
        dots[0].set(markersize=6, clip_on=False)  # A dot may be at 100, at the edge of the plot.
        label = f"{model['mean']:.2f}"
        if model["standard_deviation"] is not None:
            label += f" \u00b1 {model['standard_deviation']:.2f}"
        axes.annotate(
            label,
            (min(model["accuracy"]) if at_left[row] else max(model["accuracy"]), row),
            xytext=(-10 if at_left[row] else 10, 0),
            ha="right" if at_left[row] else "left",
            textcoords="offset points",
            va="center",
            fontsize=style.TEXT_SIZE,
            color=color,
        )
    style.named_rows(axes, [_named(model) for model in models])
    axes.set_xlim(left, right)
    axes.set_xlabel("accuracy on the test images, per cent", fontsize=style.TEXT_SIZE)
    axes.set_title(f"{title}: {_seeds(summary)}", fontsize=style.TITLE_SIZE, loc="left")
    figure.savefig(unlinked(path))


def _named(model: dict[str, Any]) -> str:
    sweep = model.get("sweep")
    if not sweep:
        return model["label"]
    return f"{model['label']}\nrate {sweep['base_lr']:g}, decay {sweep['layer_decay']:g}"


def _seeds(summary: dict[str, Any]) -> str:
    count = len(summary["nets"][0]["accuracy"])
    if count == 1:
        return "one number for each model"
    return f"{count} seeds; a dot is one seed, a line the mean \u00b1 standard deviation"
