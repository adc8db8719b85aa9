"""Reads the recipe in the folder of a run, and compares it with a new recipe."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fd_large.errors import ConfigError, FDError
from fd_large.files import kind_of, read_json
from fd_large.recipes.fields import flat_plain, override
from fd_large.recipes.file_names import CHECKPOINTS, RECIPE, STOP_FILE
from fd_large.recipes.run import LENGTH, Run
from fd_large.recipes.sections import FOLLOWING, STUDENTS
from fd_large.recipes.small_data import fitted_fields

_REMEDY = "Restore the file, or use the release that wrote it."


def recipe_file(folder: str | Path, *, where: str) -> Path:
    """Returns the path of recipe.json in a run's folder.

    `where` is the command, for messages.

    Raises: ConfigError: if the folder is not a run's, or is the common folder of several students.
    """
    path = Path(folder) / RECIPE
    kind = kind_of(path, where=where)
    if students := sorted(recipe.parent for recipe in Path(folder).glob(f"{STUDENTS}/*/{RECIPE}")):
        raise ConfigError(
            f"{where}: {folder}: a run with several students; got their common folder, expected "
            f"the folder of one student. Name {' or '.join(map(str, students))}."
        )
    if kind != "file":
        raise ConfigError(
            f"{where}: {folder}: not a run; got a path without {RECIPE}, expected the folder of a "
            "run. Name such a folder, for example runs/quickstart."
        )
    return path


def run_of_checkpoint(path: str | Path) -> Path:
    """Returns the folder of the run to which the checkpoint RUN/checkpoints/NAME belongs.

    Any other path, such as the folder of a run, is returned unchanged.
    """
    path = Path(path)
    above = path.parent.parent
    return above if path.parent.name == CHECKPOINTS and kind_of(above / RECIPE) == "file" else path


def read_recipe(folder: str | Path, *, where: str) -> Run:
    """Returns the recipe of a run; `where` is the command, for messages.

    Raises: ConfigError: if the folder is not a run's, or is the common folder of several students,
        or if the recipe cannot be read.
    """
    path = recipe_file(folder, where=where)
    recipe = read_json(path, where=where, holds=dict, remedy=_REMEDY)
    try:
        return Run.from_dict(recipe)
    except ConfigError as error:
        raise ConfigError(
            f"{where}: {path}: cannot be read; got {error}, expected the run's own recipe. "
            f"{_REMEDY}"
        ) from error


def require_same_settings(run: Run) -> None:
    """Refuses a run whose folder holds a run with other settings.

    Only fields that weights cannot complete later are compared. A folder that cannot be read is
    accepted here; the mistake is reported when the run starts.

    Raises: ConfigError: with the fields that differ.
    """
    path = Path(run.run_dir()) / RECIPE
    try:
        stored = read_json(path, where="--runtime.run_dir", holds=dict)
        changes = run.changes_before_weights(stored)
    except (FDError, AttributeError):
        return
    # Runs of one student and of several are told apart when the run enters the folder.
    if changes and bool(stored.get("students")) == bool(run.students):
        raise other_settings(path.parent, changes)


def with_stored_ends(run: Run, named: Collection[str]) -> Run:
    """Returns a run with those values of the stored run that were not set but computed.

    If base_lr is the same, the rates at the ends of the schedule and the warm-up are taken from the
    stored run, since runs of earlier versions computed them in another way. Fields that were fitted
    to the images (`small_data.fit`) are taken from it, too. Fields in `named` (full names), which
    the user set, stay unchanged. Without a stored run in the folder `run.run_dir()`, the run is
    returned unchanged.

    Raises: ConfigError: if the stored values were fitted to other images.
    """
    path = Path(run.run_dir()) / RECIPE
    try:
        stored = read_json(path, where="--runtime.run_dir", holds=dict)
        before = Run.from_dict(stored)
    except (FDError, AttributeError):
        return run  # The mistake is reported when the run enters the folder.
    names: set[str] = set()
    if before.name == run.name:
        names |= set(fitted_fields(run))
        if "batch.global_batch_size" in names and _place(before) != _place(run):
            raise ConfigError(
                f"{path.parent}: holds a run of {run.name} on other images; got data.root "
                f"{run.data.root!r}, expected {before.data.root!r}. Set --runtime.run_dir to "
                "another folder, or --fresh to start over here. If the images have moved, make a "
                "link at their old place."
            )
    if before.optim.base_lr == run.optim.base_lr:
        names |= set(FOLLOWING)
    for name, student in before.students.items():
        if (now := run.students.get(name)) and now.base_lr == student.base_lr:
            names |= {f"students.{name}.warmup_lr", f"students.{name}.min_lr"}
    values = flat_plain(before.to_dict())
    return override(run, {name: values[name] for name in names.difference(named)})


def _place(run: Run) -> str:
    """Returns where a run's training images are, to compare it with another run's.

    This is `data.root` as an absolute path without links, or unchanged if it is a URL.
    """
    return run.data.root if "://" in run.data.root else os.path.realpath(run.data.root)


def other_settings(folder: Path, changes: Mapping[str, tuple[Any, Any]]) -> ConfigError:
    """Returns the error for a folder with a run of other settings.

    The changes are {field: (the stored run's value, the new value)}.
    """
    changed = "; ".join(f"{name} {was!r} -> {now!r}" for name, (was, now) in changes.items())
    expected, longer = "the same", ""
    if changes.keys() <= set(LENGTH):
        expected = "the same length or a larger one"
        longer = (
            " To end it sooner, stop it (make the file "
            f"{folder / STOP_FILE}): export and evaluate take its last checkpoint."
        )
    return ConfigError(
        f"{folder}: holds a run with other settings; got {changed}, expected {expected}. Set "
        f"--runtime.run_dir to another folder, or --fresh to start over here.{longer}"
    )
