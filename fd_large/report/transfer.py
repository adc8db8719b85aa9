"""Makes the table of `transfer`, with models' scores on each task and those of the paper.

The table is made from summary.json and the folders of its runs, also while runs still train.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from fd_large.errors import ConfigError
from fd_large.files import json_object, kind_of, read_json, replacing, unlinked, write_json
from fd_large.recipes.file_names import PAGE, SUMMARY
from fd_large.report import style
from fd_large.report.comparison import MARK, in_words, said_of, seen_by, shown
from fd_large.report.evaluation_page import write_evaluation_page

if TYPE_CHECKING:
    from rich.table import Table

RECORD = "cell.json"
DONE, FAILED = "done", "failed"
"""Statuses of a cell whose run has ended. The status is "" if the run is not finished."""
# Statuses in summary.json of runs that the same command continues.
_GOES_ON = ("preempted", "interrupted")
_TITLE = "Transfer"
Interval = Callable[[list[Path], list[Path], str], dict[str, Any] | None]
COLORS = {"student": style.BLUE, "teacher": style.VERMILLION, "scratch": style.GREY}


class Value(NamedTuple):
    """Mean of a score over seeds.

    Attributes:
        mean: The mean.
        deviation: The standard deviation of the seeds' values; None for one seed.
        seeds: The value of each seed.
    """

    mean: float
    deviation: float | None
    seeds: tuple[float, ...]

    @classmethod
    def of(cls, values: list[float]) -> Value:
        """Returns the mean of the values of one or more seeds."""
        deviation = statistics.stdev(values) if len(values) > 1 else None
        return cls(statistics.fmean(values), deviation, tuple(values))

    def text(self, digits: int, *, sign: str = "") -> str:
        """Returns the mean as text, with the standard deviation for several seeds.

        Args:
            digits: Number of digits after the decimal point for one seed; several seeds have one
                more.
            sign: "+" to show the sign of positive values, or "".
        """
        if self.deviation is None:
            return f"{self.mean:{sign}.{digits}f}"
        return f"{self.mean:{sign}.{digits + 1}f} +- {self.deviation:.{digits + 1}f}"


def read_cell(folder: Path) -> tuple[str, str, dict[str, Any]]:
    """Reads the state of a cell's run.

    Args:
        folder: The run's folder.

    Returns: the status, which is `DONE`, `FAILED` or ""; the reason of a failure, or ""; and the
        content of the run's summary.json.
    """
    summary = json_object(folder / SUMMARY)
    status = summary.get("status", "")
    if status == DONE:
        return DONE, "", summary
    failure = json_object(folder / RECORD).get("failure", "")
    if not failure and status and status not in _GOES_ON:
        reason = summary.get("reason", "")
        failure = reason if reason and status == FAILED else f"{status}: {reason}".rstrip(": ")
    return (FAILED if failure else ""), failure, summary


def write_table(
    folder: Path,
    interval: Interval = lambda ours, others, score: None,
    single_class: Callable[[Path], bool] = lambda run: False,
) -> tuple[dict[str, Any], list[Table], list[Path]]:
    """Reads all runs of a table again, and writes the table as JSON, text, plot and page.

    Args:
        folder: Folder of the table, with a summary.json.
        interval: Function of the run folders of two rows and the name of a score, which returns
            the difference with its interval, or None if they are unknown.
        single_class: Function of a run's folder, which returns whether the run predicts the same
            class for every test image.

    Returns: the content of summary.json, the tables of rich, and the written files.

    Raises: ConfigError: if the folder is not that of a table.
    """
    there = kind_of(folder / SUMMARY, where="--out")
    summary = read_json(folder / SUMMARY, where="--out", holds=dict) if there else {}
    try:
        cells, columns = summary["cells"], {column["name"]: column for column in summary["columns"]}
    except (KeyError, TypeError) as error:
        got = f"{'another' if there else 'no'} {SUMMARY}"
        raise ConfigError(
            f"--out: {folder}: not the folder of a table; got {got}, expected a folder that "
            "transfer wrote. Set --out to that folder."
        ) from error
    for cell in cells:
        # The folder may have been moved, or the command runs in another folder than the trainings.
        run = folder / cell["row"] / cell["column"] / f"seed_{cell['seed']}"
        cell["run"] = str(run)
        cell["status"], cell["reason"], metrics = read_cell(run)
        keys = [score["key"] for score in columns[cell["column"]]["scores"]]
        # A dataset without masks has no mask AP.
        known = {key: metrics[key] for key in keys if metrics.get(key) is not None}
        cell["scores"] = known if cell["status"] == DONE else {}
        cell["single_class"] = bool(cell["scores"]) and single_class(run)
    summary["differences"] = [
        {"of": a, "less": b, "column": column, "score": score["key"], **value._asdict()}
        | _interval(summary, a, b, column, score, interval)
        for a, b in _pairs(summary)
        for column, score in _scores(summary)
        if (value := _difference(summary, a, b, column, score))
    ]
    write_json(folder / SUMMARY, summary)
    tables = tables_of(summary)
    picture, text = folder / "transfer.png", folder / "transfer.txt"
    draw(summary, picture)
    with replacing(text) as aside:
        aside.write_text(_as_text(tables), encoding="utf-8")
    page = write_evaluation_page(
        folder / PAGE,
        _TITLE,
        tables,
        [picture],
        facts=[
            (column["title"], _made_by(summary, column["name"])) for column in summary["columns"]
        ],
        below=", ".join(row["source"] for row in summary["rows"]),
    )
    return summary, tables, [folder / SUMMARY, text, picture, page]


def tables_of(summary: dict[str, Any]) -> list[Table]:
    """Returns the table of scores with those of the paper, and the table of differences, if any.

    Args:
        summary: Content of summary.json.
    """
    scores = list(_scores(summary))
    table = _table(f"{_TITLE}: scores on the test images", scores)
    for row in summary["rows"]:
        cells = [_cell_text(summary, row["name"], column, score) for column, score in scores]
        paper = [_paper_text(summary, row["name"], column, score) for column, score in scores]
        table.add_row(row["label"], *cells, end_section=not any(paper))
        if any(paper):
            table.add_row("  in the paper", *paper, end_section=True)
    table.caption, table.caption_justify = "\n".join(_notes(summary)), "left"
    differences = _table("Differences", scores)
    labels = {row["name"]: row["label"] for row in summary["rows"]}
    found_differences = {
        (entry["of"], entry["less"], entry["column"], entry["score"]): entry
        for entry in summary["differences"]
    }
    for a, b in _pairs(summary):
        texts = []
        for column, score in scores:
            difference = found_differences.get((a, b, column, score["key"]))
            texts.append(_difference_text(difference, score["digits"]) if difference else "")
        differences.add_row(f"{labels[a]} less {labels[b]}", *texts)
    with_intervals = [entry for entry in found_differences.values() if "interval" in entry]
    lines = list(said_of(with_intervals))
    if lower := _lower_is_better(summary):
        lines.append(f"Below 0 is better: {', '.join(lower)}.")
    differences.caption, differences.caption_justify = "\n".join(lines) or None, "left"
    return [table, *([differences] if differences.row_count else [])]


@style.own_look
def draw(summary: dict[str, Any], path: Path) -> None:
    """Draws a panel for each score, with a row for each model.

    A dot is the value of a seed, a line the mean over seeds, and a ring the value in the paper.

    Args:
        summary: Content of summary.json.
        path: File of the plot.
    """
    rows, scores = summary["rows"], list(_scores(summary))
    columns = min(3, len(scores))
    lines = -(-len(scores) // columns)
    # Room for the rows' labels, and in a picture of one panel for the title.
    labels = 0.09 * max(len(row["label"]) for row in rows)
    figure = style.new_figure(
        max(3.6 * columns + max(1.2, labels), 7.0), lines * (1.1 + 0.42 * len(rows)) + 0.5
    )
    panels = figure.subplots(lines, columns, sharey=True, squeeze=False).ravel()
    for axes in panels[len(scores) :]:
        axes.set_visible(False)
    for axes, (column, score) in zip(panels, scores, strict=False):
        drawn: list[float] = []
        for place, row in enumerate(rows):
            color = COLORS[row["kind"]]
            if value := _value(summary, row["name"], column, score):
                drawn += value.seeds
                axes.plot([value.mean] * 2, [place - 0.25, place + 0.25], color=color, lw=2.5)
                axes.plot(value.seeds, [place] * len(value.seeds), "o", color=color, markersize=5)
                axes.annotate(
                    value.text(score["digits"]).replace("+-", "\u00b1"),
                    (max(value.seeds), place),
                    xytext=(8, 7),
                    textcoords="offset points",
                    fontsize=style.SMALL_SIZE,
                    color=color,
                )
            if paper := _paper(summary, row["name"], column, score):
                drawn.append(paper[0])
                axes.plot(paper[0], place, "o", mfc="none", mec=color, markersize=9)
        better = ", less is better" if score["lower_is_better"] else ""
        axes.set_title(score["title"] + better, fontsize=style.TEXT_SIZE, loc="left")
        style.named_rows(axes, [row["label"] for row in rows])
        if drawn:
            # Room for the numbers on the right; the span is at least ten units of the last digit.
            span = max(max(drawn) - min(drawn), 10 * 10.0 ** -score["digits"])
            axes.set_xlim(max(0.0, min(drawn) - 0.3 * span), max(drawn) + 0.5 * span)
            axes.locator_params(axis="x", nbins=5)
        else:
            axes.set_xticks([])
    ring = "; a ring is the paper's figure" if _published(summary) else ""
    figure.suptitle(
        f"{_TITLE}: a dot is a seed, a line their mean{ring}",
        fontsize=style.TITLE_SIZE,
        x=0.01,
        ha="left",
    )
    figure.savefig(unlinked(path))


# ------------------------------------------------------------------------------------------------


def _scores(summary: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yields (name of the column, entry of the score) for each score of the table.

    Columns in which no model has been or is being trained are left out.

    Args:
        summary: Content of summary.json.
    """
    for column in summary["columns"]:
        if column["name"] in _trained(summary):
            for score in column["scores"]:
                yield column["name"], score


def _trained(summary: dict[str, Any]) -> set[str]:
    """Returns the names of the columns for which summary.json has a training of some model."""
    return {cell["column"] for cell in summary["cells"]}


def _published(summary: dict[str, Any]) -> list[dict[str, Any]]:
    """Returns the entries of summary.json with the paper's scores.

    Entries for columns without a training of some model are left out.
    """
    return [figure for figure in summary["published"] if figure["column"] in _trained(summary)]


def _cells(summary: dict[str, Any], row: str, column: str) -> list[dict[str, Any]]:
    return [cell for cell in summary["cells"] if (cell["row"], cell["column"]) == (row, column)]


def _by_seed(
    summary: dict[str, Any], row: str, column: str, score: dict[str, Any]
) -> dict[int, float]:
    """Returns {seed: score in the unit of the table} for the finished runs of a cell.

    Args:
        summary: Content of summary.json.
        row: Name of the row.
        column: Name of the column.
        score: The entry of the score in the column's entry of summary.json.
    """
    return {
        cell["seed"]: score["scale"] * cell["scores"][score["key"]]
        for cell in _cells(summary, row, column)
        if score["key"] in cell["scores"]
    }


def _value(summary: dict[str, Any], row: str, column: str, score: dict[str, Any]) -> Value | None:
    values = _by_seed(summary, row, column, score)
    return Value.of(list(values.values())) if values else None


def _difference(
    summary: dict[str, Any], a: str, b: str, column: str, score: dict[str, Any]
) -> Value | None:
    """Returns the difference of a score between two rows, seed by seed, with its mean.

    Args:
        summary: Content of summary.json.
        a: Name of a row.
        b: Name of the row whose score is subtracted.
        column: Name of the column.
        score: The entry of the score in the column's entry of summary.json.

    Returns: the difference, over the seeds that both rows have; None if they have none in common.
    """
    first, second = (_by_seed(summary, row, column, score) for row in (a, b))
    values = [first[seed] - second[seed] for seed in first if seed in second]
    return Value.of(values) if values else None


def _interval(
    summary: dict[str, Any],
    a: str,
    b: str,
    column: str,
    score: dict[str, Any],
    interval: Interval,
) -> dict[str, Any]:
    """Returns the entries of summary.json on the interval of the difference between two rows.

    The interval is in the unit of the table. Only seeds that both rows have are used. The result is
    {} if the interval is unknown.

    Args:
        summary, a, b, column, score: As for `_difference`.
        interval: Function of the run folders of two rows and the name of a score, which returns the
            difference with its interval, or None if they are unknown.
    """
    seeds = _by_seed(summary, a, column, score).keys() & _by_seed(summary, b, column, score).keys()
    ours, others = (
        [Path(cell["run"]) for cell in _cells(summary, row, column) if cell["seed"] in seeds]
        for row in (a, b)
    )
    entries = interval(ours, others, score["key"])
    if entries is None:
        return {}
    for name in ("interval", "interval_of_images"):
        entries[name] = [score["scale"] * end for end in entries[name]]
    del entries["mean"]
    return entries


def _difference_text(difference: dict[str, Any], digits: int) -> str:
    """Returns a difference as text, with its interval or else the standard deviation over seeds.

    Args:
        difference: The entry of summary.json.
        digits: Number of digits of the score after the decimal point.
    """
    if "interval" in difference:
        return shown(difference, digits + 1)
    return Value(difference["mean"], difference["deviation"], ()).text(digits, sign="+")


def _pairs(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yields the names of two rows to compare, for each pair.

    Each student is compared with each of its teachers, and with random weights. Pairs with a model
    that has no row are left out.
    """
    names = {row["name"] for row in summary["rows"]}
    for row in summary["rows"]:
        for other in (*row.get("teachers", [row.get("teacher")]), row.get("scratch")):
            if other in names:
                yield row["name"], str(other)


def _paper(
    summary: dict[str, Any], row: str, column: str, score: dict[str, Any]
) -> tuple[float, bool] | None:
    """Returns the paper's score of a cell, and whether the cell was trained with its settings.

    Args:
        summary: Content of summary.json.
        row: Name of the row.
        column: Name of the column.
        score: The entry of the score in the column's entry of summary.json.

    Returns: the score and the answer, or None if the paper has no score for the cell.
    """
    for entry in summary["published"]:
        if (entry["row"], entry["column"]) == (row, column):
            return entry["figures"][score["key"]], entry["same_settings"]
    return None


def _paper_text(summary: dict[str, Any], row: str, column: str, score: dict[str, Any]) -> str:
    paper = _paper(summary, row, column, score)
    if paper is None:
        return ""
    figure = f"{paper[0]:.{score['digits']}f}"
    return figure if paper[1] else f"({figure})"


def _cell_text(summary: dict[str, Any], row: str, column: str, score: dict[str, Any]) -> str:
    cells = _cells(summary, row, column)
    value = _value(summary, row, column, score)
    missing = sum(score["key"] not in cell["scores"] for cell in cells)
    if value is None:
        if not cells:
            return "-"
        states = {cell["status"] for cell in cells}
        return "failed" if FAILED in states else "..." if "" in states else ""
    mark = f" {MARK}" if any(cell.get("unlike_first") for cell in cells) else ""
    return value.text(score["digits"]) + mark + (f" ({missing} missing)" if missing else "")


def _notes(summary: dict[str, Any]) -> Iterator[str]:
    """Yields the lines below the table: explanations, warnings, and the errors of failed runs.

    Args:
        summary: Content of summary.json.
    """
    if lower := _lower_is_better(summary):
        yield f"Less is better: {', '.join(lower)}."
    if any(not entry["same_settings"] for entry in _published(summary)):
        yield (
            "In brackets: a figure of the paper whose settings are not published, or are not those "
            "of the cell above it."
        )
    if any(cell["status"] == "" for cell in summary["cells"]):
        yield "...: not finished."
    present = {(cell["row"], cell["column"]) for cell in summary["cells"]}
    if len(present) < len(summary["rows"]) * len(_trained(summary)):
        yield "-: not trained."
    others = [o["title"] for o in summary["columns"] if o["name"] not in _trained(summary)]
    if others:
        yield f"Not trained: {', '.join(others)}."
    yield from _of_one_class(summary)
    yield from _unlike(summary)
    yield from _swept(summary)
    for cell in summary["cells"]:
        if cell["status"] == FAILED:
            yield f"FAILED {cell['run']}: {cell['reason']}"


def _of_one_class(summary: dict[str, Any]) -> Iterator[str]:
    """Yields a note on each finished run whose model predicts one class for every test image.

    Args:
        summary: Content of summary.json.
    """
    labels = {row["name"]: row["label"] for row in summary["rows"]}
    titles = {column["name"]: column["title"] for column in summary["columns"]}
    for cell in summary["cells"]:
        if cell.get("single_class"):
            yield (
                f"{labels[cell['row']]}, {titles[cell['column']]}, seed {cell['seed']}: gives "
                "every test image the same class, so that its score is the share of this class."
            )


def _unlike(summary: dict[str, Any]) -> Iterator[str]:
    """Yields a note on each row and column whose recipe differs from the first row's in the column.

    Args:
        summary: Content of summary.json.
    """
    labels = {row["name"]: row["label"] for row in summary["rows"]}
    titles = {column["name"]: column["title"] for column in summary["columns"]}
    for cell in {(c["row"], c["column"]): c for c in summary["cells"]}.values():
        if unlike := cell.get("unlike_first"):
            yield (
                f"{MARK} {labels[cell['row']]}, {titles[cell['column']]}: other settings than the "
                f"first row (its values in brackets): {in_words(unlike)}."
            )


def _swept(summary: dict[str, Any]) -> Iterator[str]:
    """Yields notes on models that were trained on the images that a sweep held out."""
    labels = {row["name"]: row["label"] for row in summary["rows"]}
    titles = {column["name"]: column["title"] for column in summary["columns"]}
    swept = [cell for cell in summary["cells"] if "sweep" in cell]
    yield from seen_by({f"{labels[c['row']]}, {titles[c['column']]}": c["sweep"] for c in swept})


def _lower_is_better(summary: dict[str, Any]) -> list[str]:
    return [score["title"] for _, score in _scores(summary) if score["lower_is_better"]]


def _made_by(summary: dict[str, Any], column: str) -> str:
    """Returns a text on how the cells of the column `column` were trained.

    It names the recipes with their changes, the dataset and the number of seeds, or says "not
    trained" if the column has no cells.
    """
    cells = [cell for cell in summary["cells"] if cell["column"] == column]
    if not cells:
        return "not trained"
    recipes = dict.fromkeys(cell["recipe"] + _changes(cell) for cell in cells)
    data = dict.fromkeys(cell["data"] for cell in cells)
    seeds = len({cell["seed"] for cell in cells})
    count = "1 seed" if seeds == 1 else f"{seeds} seeds"
    return f"{'; '.join(recipes)}; on {', '.join(data)}; {count}"


def _changes(cell: dict[str, Any]) -> str:
    """Returns how the recipe of a cell differs from the published recipe, as text.

    The text is "" for an unchanged recipe. Otherwise it begins with ", changed", and lists the
    changed fields with the published values in brackets, if summary.json records them.

    Args:
        cell: The entry of the cell in summary.json.
    """
    if cell["unchanged"]:
        return ""
    changed = cell.get("changed", {})
    return ", changed" + (
        f" (the recipe's own in brackets): {in_words(changed)}" if changed else ""
    )


def _table(title: str, scores: list[tuple[str, dict[str, Any]]]) -> Table:
    from rich.table import Table

    # The lines below the table are as wide as the table.
    table = Table(title=title, title_justify="left", min_width=60)
    table.add_column("model", overflow="fold")
    for _, score in scores:
        table.add_column(score["title"], justify="right")
    return table


def _as_text(tables: list[Table]) -> str:
    import io

    from rich.console import Console

    console = Console(file=io.StringIO(), width=160, color_system=None, emoji=False)
    for table in tables:
        console.print(table)
    return console.file.getvalue()  # type: ignore[attr-defined]
