"""The folder of a run: its recipe, its environment, and the check of a resumed recipe."""

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
"""A recipe -> {name of a field: (its value there, its value now)}."""

PACKAGES = ("torch", "torchvision", "deepspeed", "timm", "numpy", "triton", "fairscale", "mpi4py")


@contextmanager
def written_or_logged(file: object) -> Iterator[None]:
    """Wraps the writing of an optional file, so that training continues on a full disk."""
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
    """Enters the run's folder; rank 0 writes, the others wait.

    Args:
        folder: The run's folder.
        recipe: The resolved recipe, as recipe.json holds it.
        changes: Returns the fields that differ from a stored recipe and that a resume may not
            change (`Run.changes_since`).
        start_anew: Function that empties the folder and returns the new place of the old run's
            folder, if any; None to go on from the contents of the folder.

    Raises: ConfigError: if the folder cannot be used or holds a run with other settings.
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
                "written. Choose another."
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
    """Records the environment and settings of a start, in environment.json and deepspeed.json.

    Rank 0 writes; the others return at once.

    Args:
        folder: The run's folder.
        deepspeed_config: The JSON that DeepSpeed got.
        launcher: The launcher of the ranks.
        metrics: Labels of the evaluations' metrics (`TrainingJob.metrics`), for the report.
        lower_is_better: Metrics for which lower is better (`TrainingJob.lower_is_better`).
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
                f"{file}: not a recipe that this version can read; got {error}, expected what a "
                f"run wrote. {remedy}"
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
    """Whether a path is a file or a non-empty folder."""
    kind = kind_of(path, where="--runtime.run_dir")
    return any(path.iterdir()) if kind == "folder" else kind is not None


def status_of(folder: Path) -> str | None:
    """Returns the status in summary.json, or None."""
    return summary_of(folder).get("status")


def summary_of(folder: Path) -> dict[str, Any]:
    """Returns summary.json, or an empty object if it is missing or unreadable."""
    return json_object(folder / SUMMARY)


def write_status(folder: Path, status: str, **more: Any) -> None:
    """Sets the status in summary.json and keeps the rest; any rank may call it if others are stuck.

    Args:
        folder: The run's folder, which this start owns.
        status: How the run ended.
        more: Further entries.
    """
    path = folder / SUMMARY
    with written_or_logged(path):
        aside = path.with_name(f"summary_of_rank_{distributed.rank()}.json")
        write_json(aside, {**summary_of(folder), "status": status, **more})
        aside.replace(path)


def recorded_code(folder: Path) -> dict[str, str]:
    """Returns the last recorded hashes of a run's own code files: {"module:...": SHA-256}."""
    starts = _starts(folder)
    return starts[-1]["files"] if starts else {}


def record_code(folder: Path, files: Mapping[str, str], step: int) -> None:
    """Records the hashes of the user's own files in code.json, and logs changed files.

    Rank 0 writes; the others return at once.

    Args:
        folder: The run's folder.
        files: {"module:...": SHA-256}, of `doors.hashes`.
        step: Number of finished steps at which these files begin to be used.
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
    """Returns entries of code.json: {"update": first step, "files": {"module:...": SHA-256}}.

    The record is for information and allows nothing; damaged entries are left out.
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
    """Returns the rows of a .jsonl file up to the first one of `update` or later.

    Damaged lines, such as a torn last one, are left out; an absent file has no rows.
    """
    return [line.row for line in _lines_before(path, update)[0] if line.row is not None]


def cut_before(path: Path, update: int) -> list[dict[str, Any]]:
    """Removes the rows of `update` and later from a file, and returns the kept rows.

    Without damaged lines the kept rows are the file's beginning, so that no copy and no free
    space is needed. Damaged lines before readable ones cause a warning.
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
    """Returns the lines before the first row of `update` or later, and whether one exists."""
    lines = lines_of(path)
    for index, line in enumerate(lines):
        if line.row is not None and line.row["update"] >= update:
            return lines[:index], True
    return lines, False


def versions() -> dict[str, str | None]:
    """Returns the versions of the packages that a run depends on; None if not installed."""
    installed: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            installed[name] = version(name)
        except PackageNotFoundError:
            installed[name] = None
    return installed


@cache
def source_commit() -> str | None:
    """Returns the commit of the source tree, or None without a checkout."""
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        answer = subprocess.run(command, capture_output=True, text=True, check=False)
    except FileNotFoundError:
        return None
    return answer.stdout.strip() or None
