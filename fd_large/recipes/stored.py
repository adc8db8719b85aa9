"""The recipe in the folder of a run."""

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

_REMEDY = "Restore it, or use the release that wrote it."


def recipe_file(folder: str | Path, *, where: str) -> Path:
    """Returns the path of a run's recipe.

    Args:
        folder: Folder of the run.
        where: The command, for messages.

    Raises: ConfigError: if the folder is not a run's.
    """
    path = Path(folder) / RECIPE
    kind = kind_of(path, where=where)
    if students := sorted(recipe.parent for recipe in Path(folder).glob(f"{STUDENTS}/*/{RECIPE}")):
        raise ConfigError(
            f"{where}: {folder}: a run with several students; got their common folder, expected "
            f"one student's. Name {' or '.join(map(str, students))}."
        )
    if kind != "file":
        raise ConfigError(
            f"{where}: {folder}: not a run; got a path without {RECIPE}, expected the folder of a "
            "run. Name one, for example runs/quickstart."
        )
    return path


def run_of_checkpoint(path: str | Path) -> Path:
    """Returns the run's folder of a checkpoint; any other path is returned unchanged.

    Args:
        path: The folder of a run, or RUN/checkpoints/NAME.
    """
    path = Path(path)
    above = path.parent.parent
    return above if path.parent.name == CHECKPOINTS and kind_of(above / RECIPE) == "file" else path


def read_recipe(folder: str | Path, *, where: str) -> Run:
    """Returns the recipe of a run.

    Args: As `recipe_file`.
    Raises: ConfigError: if the folder has no recipe that can be read.
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
    """Refuses a run whose folder has a run with other settings, as far as shows without weights.

    A folder that cannot be read is passed over here, and reported when the run enters it.

    Raises: ConfigError: naming the fields.
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
    """Returns a run with the stored ends of its schedule, unless the user set others.

    A run of an earlier version began with the recipe's ends, whatever its base_lr. Fields that
    follow from the number of images (`small_data.fit`) stay as stored, too.

    Args:
        run: The run as now requested.
        named: Full names of the fields that were set.

    Raises: ConfigError: if the folder has values that were fitted to other images.
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
    """Returns the place of a run's images, with links resolved."""
    return run.data.root if "://" in run.data.root else os.path.realpath(run.data.root)


def other_settings(folder: Path, changes: Mapping[str, tuple[Any, Any]]) -> ConfigError:
    """Returns the error for a folder with a run of other settings.

    Args:
        folder: Folder of the run.
        changes: {field: (value there, value now)}.
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
