"""Writes RUN/report.html, a page with the results, settings and next commands of a run."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import cycle
from pathlib import Path
from typing import Any

import numpy

from fd_large.errors import FDError
from fd_large.files import read_json
from fd_large.recipes.architectures import changed_words, full_name, image_side_of
from fd_large.recipes.file_names import INCIDENT, INCIDENTS, PAGE, PICTURES, STEP
from fd_large.report import html, style
from fd_large.report.closing import (
    RUNNING,
    called,
    closing_rows,
    next_steps,
    progress,
    status_words,
    when_measured,
    worse_than_constant,
)
from fd_large.report.loss_curve import LOOKS, smoothed
from fd_large.report.run_files import RunFiles
from fd_large.tasks.distillation.section import Objective

MOST_POINTS = 1500
MOST_INCIDENTS = 20
MOST_PICTURES = 24
CAPTIONS = {
    "features": "Held-out images, the teacher's map, and the student's before and after training. "
    "The same colour means the same feature: the teacher's first three principal components.",
}
_OF_FROZEN = ("statistics", "placement", "dtype", "layer", "targets", "mosaic", "weight")
OF_SEVERAL_TEACHERS = (
    "Held-out images, and for each teacher its map and what the student's head for it gives. Each "
    "teacher has colours of its own: its first three principal components."
)


@style.own_look
def write_run_page(files: RunFiles) -> Path:
    """Writes RUN/report.html; returns the page's path."""
    words = status_words(files)
    good = {"done": True, RUNNING: None, "preempted": None, "not finished": None}.get(words, False)
    steps = next_steps(files)
    doubt = worse_than_constant(files)
    return html.write(
        files.folder / PAGE,
        called(files),
        (
            html.paragraph(doubt) if doubt else "",
            html.tiles(_tiles(files)),
            html.section("Curves", html.charts(_charts(files))),
            html.section("Images", *_pictures(files)),
            html.section("Results", html.table(closing_rows(files))),
            html.section("Next", html.commands((s["why"], s["command"]) for s in steps)),
            html.section("Incidents", *_incidents(files)),
            html.section("Models that were not trained", html.table(_frozen(files))),
            html.section("Settings that differ from the recipe", *_settings(files)),
            html.section("Environment", html.table(_environment(files))),
        ),
        beside=html.status(words, good=good),
        below=f"{progress(files)}; {files.folder}",
    )


def _tiles(files: RunFiles) -> Iterator[tuple[str, str, str]]:
    done, _, of = progress(files).partition(" ")
    yield "steps", done, of.removesuffix(" steps")
    if len(files.trained_loss):
        first, last = files.trained_loss[[0, -1]]
        yield "training loss", f"{last:.4f}", f"{first:.4f} at the start"
    for name in [n for n in files.measured if not n.endswith("_best_constant")][:4]:
        _, values = files.evaluated(name)
        more = f"{values[0]:z.4f} at first" if len(values) > 1 else ""
        _, baseline = files.evaluated(f"{name.removesuffix('_loss')}_best_constant")
        if name.endswith("_loss") and len(baseline):
            more = f"{values[-1] / baseline[-1]:.3f} of the baseline"
        more = ", ".join(part for part in (when_measured(files, name), more) if part)
        yield files.words(name), f"{values[-1]:z.4f}", more


def _charts(files: RunFiles) -> Iterator[str]:
    counted = numpy.isfinite(files.loss)
    if not counted.any():
        return
    yield _loss(files, counted)
    kinds: dict[str, list[str]] = {}
    for name in files.measured:
        kind = files.kind(name)
        # Losses and cosines of single targets share a chart for all images.
        shared = kind if kind.endswith(("_loss", "_cosine")) else name
        if kind != "loss" and not kind.endswith("best_constant"):
            kinds.setdefault(shared, []).append(name)
    for kind, names in kinds.items():
        yield _evaluated(files, kind, names)
    yield _curve("rate", "learning rate", files.updates, files.learning_rate, style.GREY)
    for name, words in (("grad_norm", "gradient norm"), ("images_per_second", "images per second")):
        values = files.column(name)
        known = numpy.isfinite(values)
        if known.any():
            steps, values = files.updates[known], values[known]
            yield _curve(name, words, steps, values, style.BLUE, from_zero=True)


def _loss(files: RunFiles, counted: numpy.ndarray) -> str:
    figure, axes = _small(files.words("loss"))
    steps, loss = files.updates[counted], files.loss[counted]
    smooth, thin = smoothed(loss), _thin(len(loss))
    axes.plot(steps[thin], loss[thin], color=style.BLUE, alpha=0.3, linewidth=0.7)
    axes.plot(steps[thin], smooth[thin], color=style.BLUE, linewidth=1.6, label="training")
    high, low = numpy.percentile(loss, 99.5), loss.min()
    for values in _lines(files, axes, files.losses):
        high, low = max(high, *values), min(low, *values)
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    axes.set_ylim(low - margin, high + margin)
    style.legend_below(figure, 7)
    return html.chart(figure, "loss", f"{files.words('loss')} over steps")


def _evaluated(files: RunFiles, kind: str, names: list[str]) -> str:
    """Returns the HTML chart of a metric over steps, with a line for each set of images.

    Args:
        files: The run.
        kind: The metric, such as "cosine".
        names: Names of the metric on each set of images.
    """
    words = files.words(names[0]) if len(names) == 1 else kind.replace("_", " ")
    figure, axes = _small(words)
    several = len(names) > 1
    for _ in _lines(files, axes, names, kind=kind if several else ""):
        pass
    if "(%)" in words and axes.get_ylim()[1] > 100 >= axes.dataLim.y1:
        axes.set_ylim(top=100)
    if several:
        style.legend_below(figure, 7)
    return html.chart(figure, kind, f"{words} over steps")


def _lines(
    files: RunFiles, axes: Any, names: list[str], *, kind: str = ""
) -> Iterator[list[float]]:
    """Draws a line for each metric, with its constant-prediction baseline.

    Args:
        files: The run.
        axes: The axes.
        names: Names of the metrics.
        kind: The metric in the chart's title, which labels then omit; "" to keep whole labels.

    Yields: the values that were drawn for each metric.
    """
    for name, (colour, marker, dashes) in zip(names, cycle(LOOKS)):
        at, values = files.evaluated(name)
        size = 3 if len(at) <= 40 else 0
        words = files.words(name)
        if kind:
            words = name.removesuffix(f"_{kind}").replace("_", " ")
        axes.plot(at, values, color=colour, marker=marker, markersize=size, label=words)
        _, constants = files.evaluated(f"{name.removesuffix('_loss')}_best_constant")
        for constant in constants[-1:]:
            label = f"{words.removesuffix(' loss')}, constant prediction"
            axes.axhline(constant, color=colour, linewidth=1, linestyle=dashes, label=label)
        yield [*values, *constants[-1:]]


def _curve(
    name: str,
    words: str,
    steps: numpy.ndarray,
    values: numpy.ndarray,
    colour: str,
    *,
    from_zero: bool = False,
) -> str:
    figure, axes = _small(words)
    thin = _thin(len(values))
    axes.plot(steps[thin], values[thin], color=colour, linewidth=1.5)
    if from_zero:
        axes.set_ylim(bottom=0)
    return html.chart(figure, name, f"{words} over steps")


def _small(words: str) -> tuple[Any, Any]:
    from matplotlib.ticker import MaxNLocator

    figure = style.plot_figure(4.6, 2.6, left=0.6, right=0.2, bottom=0.45, top=0.36)
    axes = figure.subplots()
    style.plain_axes(axes)
    axes.tick_params(labelsize=8)
    axes.set_title(words, fontsize=9.5, loc="left")
    axes.set_xlabel("steps", fontsize=8, color=style.GREY)
    axes.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    style.short_numbers(axes, (-3, 4), 7)
    return figure, axes


def _thin(count: int) -> numpy.ndarray:
    """Returns the indices of the points to draw, of `count` points in a row: (m,) int64.

    These are all points, or `MOST_POINTS` of them at equal distances, with the first and the last.
    """
    return numpy.unique(numpy.linspace(0, count - 1, min(count, MOST_POINTS)).round().astype(int))


def _pictures(files: RunFiles) -> Iterator[str]:
    paths = sorted((files.folder / PICTURES).glob("**/*.png"))
    paths = [path for path in paths if path.stem != "loss_curve"]
    paths.sort(key=lambda path: (path.stem not in CAPTIONS, path))
    for path in paths[:MOST_PICTURES]:
        caption = CAPTIONS.get(path.stem, path.relative_to(files.folder).as_posix())
        if path.stem == "features" and files.recipe.get("teachers"):
            caption = OF_SEVERAL_TEACHERS
        elif path.stem == "features" and not files.has(f"{PICTURES}/features_after.npz"):
            caption = caption.replace("before and after training", "before training")
        yield html.picture(path, path.stem.replace("_", " "), caption)
    if len(paths) > MOST_PICTURES:
        yield html.paragraph(
            f"{len(paths) - MOST_PICTURES} more images are in {files.folder}/{PICTURES}."
        )


def _incidents(files: RunFiles) -> Iterator[str]:
    rows = []
    for path in sorted(files.folder.glob(f"{INCIDENTS}/{STEP}*/{INCIDENT}")):
        try:
            incident = read_json(path)
            off = ", ".join(
                f"{measure['what']} {float(measure['value']):.4g}" for measure in incident["off"]
            )
            broken = [
                f"{tensor['kind']} of {tensor['tensor']} on rank {tensor['rank']}"
                for tensor in incident.get("state_not_finite", [])[:1]
            ]
            off = ", ".join([*filter(None, [off]), *broken])
            back = incident.get("restored")
        except (FDError, ValueError, KeyError, TypeError):
            continue
        did = "skipped" if back is None else f"skipped, and back to step {back}"
        rows.append((incident["index"] + 1, off or "not finite", did))
    if not rows:
        yield html.paragraph("None: no step was skipped.")
        return
    yield html.table(rows[-MOST_INCIDENTS:], head=("step", "abnormal values", "what was done"))
    replay = (
        f"Each incident has a folder in {files.folder}/incidents; the command replay repeats its "
        "step."
    )
    yield html.paragraph(f"{len(rows)} in all. {replay}")


def _frozen(files: RunFiles) -> list[tuple[str, str]]:
    rows = []
    for name, section in files.frozen_models.items():
        rows.append((name, full_name(section)))
        weights = "RANDOM: shows only that training runs"
        rows.append(("weights", weights if section["source"] == "random" else section["source"]))
        shown = {"changed fields": changed_words(section)}
        shown |= {key: section.get(key) for key in _OF_FROZEN}
        if shown["layer"] == Objective.layer:
            del shown["layer"]  # The default layer is left out, as on the model card.
        if side := image_side_of(section, files.recipe["data"]["image_size"]):
            shown["image_size"] = f"{side} px"
        rows += [(key.replace("_", " "), _plain(value)) for key, value in shown.items() if value]
    if epochs := files.summary.get("epochs_from_stored_maps"):
        rows.append(("epochs from maps that were stored before", _plain(epochs)))
    return rows


def _settings(files: RunFiles) -> Iterator[str]:
    rows = [
        (name, _plain(value), _plain(usual))
        for name, (value, usual) in files.changed.items()
        if name != "runtime.run_dir"
    ]
    if rows:
        yield html.table(rows, head=("field", "this run", "recipe"))
        yield html.paragraph(
            "Some fields follow other fields, or the weights that the run starts from. All "
            "settings: recipe.json."
        )
    else:
        yield html.paragraph("None. All settings: recipe.json.")


def _environment(files: RunFiles) -> list[tuple[str, str]]:
    known = files.environment
    rows = [
        (words, _plain(known[key]))
        for key, words in (
            ("host", "host"),
            ("platform", "system"),
            ("device", "device"),
            ("world_size", "ranks"),
            ("launcher", "started by"),
            ("python", "Python"),
            ("commit", "commit"),
        )
        if known.get(key)
    ]
    packages = known.get("packages", {})
    listed = ", ".join(f"{name} {number}" for name, number in packages.items() if number)
    return [*rows, *([("packages", listed)] if listed else [])]


def _plain(value: Any) -> str:
    if isinstance(value, list):
        return " ".join(map(str, value)) or "none"
    return "none" if value in (None, "") else str(value)
