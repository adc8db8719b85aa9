"""The command `fd-large runs FOLDER`, which lists runs."""

from __future__ import annotations

import csv
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import Positional, arg

from fd_large.checkpoint.lease import OWNER, living_owner
from fd_large.checkpoint.owner import Owner
from fd_large.cli.arguments import parse
from fd_large.cli.output import tables
from fd_large.errors import ConfigError, FDError, nearest, printable
from fd_large.files import kind_of, read_bytes
from fd_large.recipes.sections import STUDENTS
from fd_large.report.closing import RUNNING
from fd_large.report.run_files import RunFiles, read_run
from fd_large.report.run_list import DAMAGED, FAILED, KILLED, STATES, ListedRun, find_runs, state_of
from fd_large.runtime import terminal

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Runs:
    """List the runs below a folder with their states and results.

    Without --best, the runs are sorted by name, and each is shown with the newest value of its main
    metric. The main metric is the recipe's eval.best_metric, or, if that is empty, the first metric
    of the run's evaluations.
    """

    # Folder that contains the run folders, at any depth, for example runs.
    folder: Annotated[str, Positional, arg(metavar="FOLDER")]
    # Metrics, as SET/METRIC or by the names in evaluations.jsonl (held_out_loss, test_top1). For
    # each run, the best value of each metric and the step of that value are shown. Runs are sorted
    # by the first metric, the best run first; the task of a run decides whether lower is better.
    # The evaluation before the first step does not count.
    best: tuple[str, ...] = ()
    # Fields of the recipe whose values are shown for each run, for example optim.base_lr.
    show: tuple[str, ...] = ()
    # Conditions FIELD=VALUE on the listed runs. FIELD is a field of the recipe, or state, recipe or
    # student.
    where: tuple[str, ...] = ()
    # Print comma-separated values, with the newest value of every metric that was measured.
    csv: bool = False


def main(arguments: list[str]) -> int:
    """Prints a table of the runs below a folder; returns the exit code.

    Messages on folders that cannot be read go to stderr.
    """
    options = parse(Runs, arguments, command="runs")
    root = Path(options.folder)
    runs = _listed(root)
    best = [_metric(name, runs) for name in options.best]
    for name in options.show:
        _require_known(name, "--show", runs)
    runs = _chosen(runs, options.where)
    if best:
        runs.sort(key=lambda run: _rank(run, best[0]))
    if options.csv:
        _print_csv(root, runs, best, options.show)
    else:
        tables().print(_table(root, runs, best, options.show))
        for run in runs:
            if run.problem:
                print(printable(f"{_name(run, root)}: {run.problem}"))
    return 0


def _listed(root: Path) -> list[ListedRun]:
    """Returns all runs below the folder `root`, at any depth.

    Raises: ConfigError: if `root` is no folder, or no run is below it.
    """
    kind = kind_of(root, where="runs")
    if kind != "folder":
        got = {"file": "a file", "other": "a pipe or a device", None: "nothing there"}[kind]
        raise ConfigError(
            f"runs: {root}: not a folder; got {got}, expected a folder with runs in it. Name such "
            "a folder, for example runs."
        )
    runs = [_read(folder) for folder in find_runs(root, _say)]
    if not runs:
        raise ConfigError(
            f"runs: {root}: no run in this folder; got no subfolder with a recipe.json, expected "
            "one or more. Name the folder that --runtime.run_dir is in, for example runs."
        )
    return runs


def _say(error: FDError) -> None:
    terminal.show_error(str(error))


def _read(folder: Path) -> ListedRun:
    # All students of a run are one start's.
    owned = folder.parents[1] if folder.parent.name == STUDENTS else folder
    is_alive = any(living_owner(each) for each in dict.fromkeys((folder, owned)))
    try:
        files = read_run(folder, newest_row=True)
        state = RUNNING if is_alive else KILLED if _was_killed(owned, files) else state_of(files)
        return ListedRun(folder, state, files, _reason(files) if state == FAILED else "")
    except FDError as error:
        return ListedRun(folder, RUNNING if is_alive else DAMAGED, problem=str(error))
    except OSError as error:  # Removed or closed while it was read.
        return ListedRun(folder, DAMAGED, problem=f"cannot be read: {error.strerror}")


def _was_killed(owned: Path, files: RunFiles) -> bool:
    """Whether a run's last launch was killed, and could therefore not record its end.

    The file owner.json in the folder `owned` names the launch; a launch that ends by itself removes
    the file. A launch whose summary.json is in `files` has recorded its end.
    """
    if not kind_of(owned / OWNER):
        return False
    return Owner.parse(read_bytes(owned / OWNER)).start != files.summary.get("start")


def _reason(files: RunFiles) -> str:
    status, reason = files.summary.get("status", ""), files.summary.get("reason", "")
    return f"{status}: {reason}" if reason else status


def _chosen(runs: list[ListedRun], conditions: Sequence[str]) -> list[ListedRun]:
    """Returns those of `runs` that meet all `conditions`, each a text FIELD=VALUE.

    Raises:
        ConfigError: If a condition has another form, no run has the field, or the field is `state`
            and its value is no state of a run.
    """
    chosen = runs
    for word in conditions:
        name, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(
                f"--where: not a field with a value; got {word!r}, expected FIELD=VALUE. Write for "
                "example --where state=running."
            )
        _require_known(name, "--where", runs)
        if name == "state" and value.lower() not in STATES:
            raise ConfigError(
                f"--where: no run can have this state; got {value!r}, {nearest(value, STATES)}. "
                "Change --where."
            )
        chosen = [r for r in chosen if name in r.fields and _same(r.fields[name], value)]
    return chosen


def _require_known(name: str, where: str, runs: Iterable[ListedRun]) -> None:
    known = {field for run in runs for field in run.fields}
    if name not in known:
        raise ConfigError(
            f"{where}: no run has this field; got {name!r}, {nearest(name, known)}. Change {where}."
        )


def _same(value: Any, text: str) -> bool:
    """Whether `text`, which the user typed, stands for `value`, the value of a recipe's field.

    "1e-4" stands for 0.0001, and "true" for True; upper and lower case do not matter.
    """
    if isinstance(value, int | float) and not isinstance(value, bool):
        try:
            return float(text) == value
        except ValueError:
            return False
    return _text(value).lower() == text.lower()


def _metric(name: str, runs: Iterable[ListedRun]) -> str:
    """Returns the name in evaluations.jsonl of the metric `name`, in which `/` may stand for `_`.

    Raises: ConfigError: if none of `runs` has measured the metric.
    """
    known = list(dict.fromkeys(each for run in runs for each in run.measured))
    metric = name.replace("/", "_")
    if metric not in known:
        if not known:
            raise ConfigError(
                f"--best: no run here has been evaluated yet; got {name!r}, expected a run with an "
                "evaluation. Leave --best out."
            )
        raise ConfigError(
            f"--best: no run has this metric; got {name!r}, {nearest(metric, known)}. "
            "Change --best, or leave it out."
        )
    return metric


def _rank(run: ListedRun, metric: str) -> tuple[bool, float]:
    best = run.best(metric)
    if best is None:
        return True, 0.0
    return False, best.value if run.lower_is_better(metric) else -best.value


def _table(
    root: Path, runs: Sequence[ListedRun], best: Sequence[str], fields: Sequence[str]
) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(title=printable(f"Runs below {root}: {len(runs)}"), title_justify="left")
    table.add_column("run", overflow="fold")
    for column in ("recipe", "student", *fields, "state"):
        table.add_column(column, overflow="fold")
    table.add_column("step", justify="right")
    table.add_column("loss", justify="right")
    for name in best or ["newest value"]:
        table.add_column(printable(f"best {name}" if best else name), overflow="fold")
    table.add_column("last written", no_wrap=True)
    for run in runs:
        progress = f"{run.step} of {run.steps}" if run.steps else str(run.step)
        if best:
            bests = [run.best(name) for name in best]
            values = [f"{each.value:.5g} at {each.step}" if each else "" for each in bests]
        else:
            last = run.last(run.main_metric)
            values = [f"{run.main_metric} {last.value:.5g} at {last.step}" if last else ""]
        cells = [
            *(_name(run, root), run.recipe.get("name", ""), run.student),
            *(_text(run.fields.get(name, "")) for name in fields),
            *(run.state, progress if run.files else "", _number(run.loss), *values),
            time.strftime("%Y-%m-%d %H:%M", time.localtime(run.written)) if run.written else "",
        ]
        table.add_row(*(Text(printable(cell)) for cell in cells))
    return table


def _print_csv(
    root: Path, runs: Sequence[ListedRun], best: Sequence[str], fields: Sequence[str]
) -> None:
    measured = list(dict.fromkeys(name for run in runs for name in run.measured))
    of_best = [column for name in best for column in (f"best {name}", f"step of best {name}")]
    writer = csv.writer(terminal.out(), lineterminator="\n")
    titles = ["run", "recipe", "student", "state", "step", "steps", "written", "loss"]
    writer.writerow(map(_cell, [*titles, *fields, *of_best, *measured, "problem"]))
    for run in runs:
        bests = [run.best(name) for name in best]
        newest = [run.last(name) for name in measured]
        written = time.strftime("%Y-%m-%dT%H:%M:%S%z", time.localtime(run.written or 0))
        row = [
            *(_name(run, root), run.recipe.get("name", ""), run.student, run.state),
            *(run.step if run.files else None, run.steps, written if run.written else None),
            *(run.loss, *(_value(run.fields.get(name)) for name in fields)),
            *(value for each in bests for value in (each or (None, None))),
            *(each.value if each else None for each in newest),
            run.problem,
        ]
        writer.writerow(map(_cell, row))


def _cell(value: Any) -> Any:
    """Returns `value` for a cell of a CSV file.

    A text becomes one line, and gets a leading `'` if a spreadsheet could take it for a formula.
    Values that are no text are returned unchanged.
    """
    if not isinstance(value, str):
        return value
    text = " ".join(printable(value).split("\n"))
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t")) else text


def _name(run: ListedRun, root: Path) -> str:
    name = str(run.folder.relative_to(root))
    return run.folder.resolve().name if name == "." else name


def _text(value: Any) -> str:
    return " ".join(map(str, value)) if isinstance(value, list) else str(value)


def _value(value: Any) -> Any:
    """Returns `value` unchanged if it is a number or None, and otherwise as text.

    Negative numbers stay numbers so that `_cell` does not put a `'` before the minus sign.
    """
    return value if value is None or isinstance(value, int | float) else _text(value)


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5g}"
