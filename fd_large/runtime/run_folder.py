"""Reads and writes files in a run's folder, and checks that a resume keeps the run's settings."""

from __future__ import annotations

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fd_large.errors import ConfigError, masked
from fd_large.files import json_object, kind_of, read_json, replacing, write_json
from fd_large.ranks import distributed
from fd_large.recipes.file_names import (
    CODE,
    DEEPSPEED,
    ENVIRONMENT,
    OVERWRITTEN,
    RECIPE,
    SUMMARY,
    is_run,
)
from fd_large.recipes.row_files import Line, lines_of, numbers_of
from fd_large.recipes.stored import other_settings

log = logging.getLogger(__name__)

Changes = Callable[[dict[str, Any]], Mapping[str, tuple[Any, Any]]]
"""Function that takes a stored recipe, and returns (stored value, current value) of each field that
differs from the current recipe, by the field's name."""

PACKAGES = ("torch", "torchvision", "deepspeed", "timm", "numpy", "triton", "fairscale", "mpi4py")


@contextmanager
def written_or_logged(file: object) -> Iterator[None]:
    """Logs an OSError raised in the block instead of raising it, so that training continues.

    Args:
        file: The file that the block writes, which training can do without.
    """
    try:
        yield
    except OSError as error:
        log.error("%s: NOT WRITTEN: %s", file, error)


def open_folder(
    folder: Path,
    recipe: dict[str, Any],
    changes: Changes,
    *,
    start_anew: Callable[[], Path | None] | None = None,
) -> None:
    """Checks that a run may use a folder, makes the folder, and writes recipe.json.

    Rank 0 does the work. All ranks must call this function.

    Args:
        folder: The run's folder.
        recipe: The resolved recipe, as it is written to recipe.json.
        changes: Function that takes a stored recipe, and returns the fields that differ and that a
            resume may not change (`Run.changes_since`).
        start_anew: Function that moves the folder of an old run aside, and returns the new path of
            the old folder, or None if the folder had no files to keep. None in place of the
            function resumes the run in the folder, if there is one.

    Raises:
        ConfigError: On all ranks, if the folder cannot be used or has a run with other settings.
    """
    problem = None
    if distributed.is_main():
        try:
            if start_anew and (old := start_anew()):
                log.info("--fresh: the old run is in %s", old)
            _enter(folder, recipe, changes)
        except ConfigError as error:
            problem = str(error)
        except OSError as error:
            problem = (
                f"--runtime.run_dir: cannot be used; got {error}, expected a folder that can be "
                "written. Choose another folder."
            )
    if problem := distributed.broadcast_object(problem):
        raise ConfigError(problem)


def write_environment(
    folder: Path,
    deepspeed_config: dict[str, Any],
    launcher: str,
    metrics: Mapping[str, str],
    lower_is_better: Collection[str],
) -> None:
    """Writes environment.json and deepspeed.json, which describe this launch of the run.

    Only rank 0 writes; on other ranks this function does nothing.

    Args:
        folder: The run's folder.
        deepspeed_config: The configuration that DeepSpeed got.
        launcher: Name of the launcher of the ranks.
        metrics: Labels of the evaluations' metrics, by name (`TrainingJob.metrics`), for the
            report.
        lower_is_better: Names of the metrics of which lower values are better
            (`TrainingJob.lower_is_better`).
    """
    if not distributed.is_main():
        return
    write_json(folder / DEEPSPEED, deepspeed_config)
    device = distributed.device()
    write_json(
        folder / ENVIRONMENT,
        {
            "python": sys.version.split()[0],
            "packages": versions(),
            "commit": source_commit(),
            "host": platform.node(),
            "platform": platform.platform(),
            "device": device.type,
            "world_size": distributed.world_size(),
            "launcher": launcher,
            "command": masked(sys.argv),
            "metrics": dict(metrics),
            "lower_is_better": list(lower_is_better),
        },
    )


def _enter(folder: Path, recipe: dict[str, Any], changes: Changes) -> None:
    file = folder / RECIPE
    if kind_of(file, where="--runtime.run_dir"):
        remedy = "Set --runtime.run_dir to another folder, or --fresh to start over here."
        stored = read_json(file, where="--runtime.run_dir", holds=dict, remedy=remedy)
        try:
            differences = changes(stored)
        except (ValueError, ConfigError, AttributeError) as error:
            raise ConfigError(
                f"{file}: not a recipe that this version can read; got {error}, expected a recipe "
                f"that a run wrote. {remedy}"
            ) from None
        if stored.get("students") and not recipe.get("students"):
            # The remedy is not --fresh, which would move all students' runs aside.
            raise ConfigError(
                f"{folder}: holds the runs of several students; got a run of one, expected "
                f"{', '.join(stored['students'])}. Resume one of them by --config "
                f"{folder}/students/NAME/recipe.json without --runtime.run_dir, all of them by "
                "the command that began them; or set --runtime.run_dir to another folder."
            )
        if differences:
            raise other_settings(folder, differences)
    elif not is_run(folder) and (
        foreign := [name for name in OVERWRITTEN if _holds_something(folder / name)]
    ):
        raise ConfigError(
            f"--runtime.run_dir: {folder}: not a run's folder, and a run would overwrite its "
            f"files; got {', '.join(foreign)} and no {RECIPE}, expected a run or none of these. "
            "Set --runtime.run_dir to another folder."
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(file, recipe)


def _holds_something(path: Path) -> bool:
    """Whether `path` is a file or a folder that is not empty; False if it does not exist."""
    kind = kind_of(path, where="--runtime.run_dir")
    return any(path.iterdir()) if kind == "folder" else kind is not None


def status_of(folder: Path) -> str | None:
    """Returns the status in the summary.json of the run's folder `folder`.

    The result is None if the file is missing or damaged, or has no status.
    """
    return summary_of(folder).get("status")


def summary_of(folder: Path) -> dict[str, Any]:
    """Returns the contents of summary.json in the run's folder `folder`.

    The result is empty if the file is missing or damaged.
    """
    return json_object(folder / SUMMARY)


def write_status(folder: Path, status: str, **more: Any) -> None:
    """Sets the status in summary.json, and keeps other entries.

    Any rank may call this function, also when other ranks hang. An OSError is only logged.

    Args:
        folder: The run's folder, which this launch must own.
        status: How the run ended.
        more: Further entries to set.
    """
    path = folder / SUMMARY
    with written_or_logged(path):
        aside = path.with_name(f"summary_of_rank_{distributed.rank()}.json")
        write_json(aside, {**summary_of(folder), "status": status, **more})
        aside.replace(path)


def recorded_code(folder: Path) -> dict[str, str]:
    """Returns the hashes of the user's code files that the run in `folder` used last.

    Returns: the SHA-256 of each file, from code.json, by the file's "module:..." name; empty if
        none are recorded.
    """
    starts = _starts(folder)
    return starts[-1]["files"] if starts else {}


def record_code(folder: Path, files: Mapping[str, str], step: int) -> None:
    """Adds the hashes of the user's code files to code.json if they changed, and warns of changes.

    Only rank 0 writes; on other ranks this function does nothing.

    Args:
        folder: The run's folder.
        files: SHA-256 of each file, by its "module:..." name (`doors.hashes`).
        step: Number of finished steps from which on the run uses these files.
    """
    if not distributed.is_main() or dict(files) == (before := recorded_code(folder)):
        return
    for source in before.keys() & files.keys():
        if before[source] != files[source]:
            log.warning(
                "%s: NOT THE FILE that this run used before step %d (its hash was %s, now %s): "
                "the run continues with the new file, and code.json records both",
                source,
                step,
                before[source][:12],
                files[source][:12],
            )
    with written_or_logged(folder / CODE):
        write_json(folder / CODE, [*_starts(folder), {"update": step, "files": dict(files)}])


def _starts(folder: Path) -> list[dict[str, Any]]:
    """Returns the entries of code.json in the run's folder `folder`, oldest first.

    An entry has "files", the SHA-256 of each of the user's code files by "module:..." name, and
    "update", the number of finished steps from which on the run used these files. Damaged entries
    are left out; the result is empty if the file is missing or damaged. The entries are for
    information alone, and do not permit that a file is run.
    """
    try:
        starts = read_json(folder / CODE, where=CODE, holds=list)
    except ConfigError:
        return []
    return [
        start
        for start in starts
        if isinstance(start, dict)
        and isinstance(files := start.get("files"), dict)
        and all(isinstance(digest, str) for digest in files.values())
    ]


def rows_before(path: Path, update: int) -> list[dict[str, Any]]:
    """Returns the rows of a .jsonl file before the first row whose "update" is `update` or later.

    Damaged lines, such as an incomplete last line, are left out. A missing file has no rows.

    Args:
        path: The file.
        update: Index of a step, from 0; in evaluations.jsonl a number of finished steps.
    """
    return [line.row for line in _lines_before(path, update)[0] if line.row is not None]


def cut_before(path: Path, update: int) -> list[dict[str, Any]]:
    """Cuts a .jsonl file before the first row whose "update" is `update` or later.

    Damaged lines are removed too, with a warning if other rows follow. Without damaged lines, the
    file is only truncated, which needs no free space. A missing file is made.

    Args:
        path: The file.
        update: Index of a step, from 0; in evaluations.jsonl a number of finished steps.

    Returns: the kept rows.
    """
    before, goes_on = _lines_before(path, update)
    last = max((index for index, line in enumerate(before, 1) if line.row is not None), default=0)
    kept_lines = before[:last]
    path.touch()
    if damaged := [line for line in (before if goes_on else kept_lines) if line.row is None]:
        log.warning(
            "%s: %s cannot be read: damaged rows are LEFT OUT, all rows before and after are kept",
            path,
            numbers_of(damaged),
        )
    # The file is cut first, so that later rows go even if there is no room for the copy.
    os.truncate(path, sum(len(line.raw) for line in kept_lines))
    if damaged:
        with written_or_logged(path), replacing(path) as aside:
            aside.write_bytes(b"".join(line.raw for line in kept_lines if line.row is not None))
    return [line.row for line in kept_lines if line.row is not None]


def _lines_before(path: Path, update: int) -> tuple[list[Line], bool]:
    """Reads the lines of a .jsonl file before the first row whose "update" is `update` or later.

    Args:
        path: The file; a missing file has no lines.
        update: Index of a step, from 0; in evaluations.jsonl a number of finished steps.

    Returns: the pair (lines, also damaged ones; whether the file has a row after these lines whose
        "update" is `update` or later).
    """
    lines = lines_of(path)
    for index, line in enumerate(lines):
        if line.row is not None and line.row["update"] >= update:
            return lines[:index], True
    return lines, False


def versions() -> dict[str, str | None]:
    """Returns {package: its version} for `PACKAGES`; the version is None if it is not installed."""
    installed: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = None
    return installed


@cache
def source_commit() -> str | None:
    """Returns the Git commit of this package's source.

    The result is None if the source is not in a Git checkout, or if there is no `git` command.
    """
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return answer.stdout.strip() or None
