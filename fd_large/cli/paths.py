"""Checks of paths on the command line, before torch is imported, which takes seconds."""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from fd_large import doors
from fd_large.data.roots import local_kind, require_dataset, weighted_roots
from fd_large.errors import ConfigError, FDError, check_all
from fd_large.files import kind_of
from fd_large.ranks.launch import is_first_of_node
from fd_large.recipes.run import Run
from fd_large.recipes.sections import RANDOM, Student
from fd_large.tasks.registry import TASKS
from fd_large.weights.named import TIMM, require_named

_CODE = re.compile(r"\.py:\w+$")
_PATTERN = re.compile(r"[*?\[{]")


def paths_of(run: Run) -> dict[str, str]:
    """Returns the fields of a recipe that may name a file or a folder, {full name: value}.

    A value is "" for an empty field, and may also be a source of another kind, such as timm:NAME.
    """
    parts = weighted_roots(run.data.root)
    named = {f"data.root ({part.name})": part.root for part in parts}
    named = named or {"data.root": run.data.root}
    named["student.init"] = run.student.init
    named |= {"eval.root": run.eval.root, "eval.knn_root": run.eval.knn_root}
    named["objective.target_statistics"] = run.objective.target_statistics
    named |= {f"students.{name}.init": entry.init for name, entry in run.students.items()}
    for name, entry in run.teachers.items():
        named[f"teachers.{name}.target_statistics"] = entry.target_statistics
        named[f"teachers.{name}.summary.target_statistics"] = entry.summary.target_statistics
    return named | {f"{name}.source": model.source for name, model in run.frozen_models.items()}


def paths_of_models(models: Sequence[str]) -> dict[str, str]:
    """Returns the paths in the names of the models of `evaluate`, {label for messages: path}.

    A name RUN#NAME gives the path RUN, and NAME=SOURCE gives SOURCE. Other names are returned
    whole, such as timm:NAME, which is no path.
    """
    named = {}
    for name in models:
        path = re.sub(r"#[\w.]+$", "", name)
        named[f"model {name}"] = path if kind_of(Path(path)) else path.rpartition("=")[2]
    return named


def require_paths(named: Mapping[str, str]) -> None:
    """Refuses values of `named`, {field or label: value}, that are paths to nothing.

    Values of other forms, such as timm:NAME, and the contents of files are checked later, when they
    are opened.

    Raises: ConfigError: with a line for each missing path.
    """
    _on_this_node(*(partial(_require_path, flag, text) for flag, text in named.items()))


def require_contents(run: Run) -> None:
    """Refuses datasets and weights whose names or files are invalid, as far as a quick check shows.

    Raises: FDError: with a line for each mistake.
    """
    roots = {"data.root": run.data.root} if run.task.name in TASKS or run.data.root else {}
    roots |= {
        f"eval.{name}": root for name in ("root", "knn_root") if (root := getattr(run.eval, name))
    }
    students: dict[str, Student] = {
        f"students.{name}": entry for name, entry in run.students.items()
    }
    students = students or {"student": run.student}
    weights = {f"--{name}.init": entry.init for name, entry in students.items()}
    weights |= {f"--{name}.source": entry.source for name, entry in run.frozen_models.items()}
    named = {f"{name}.model": entry.model for name, entry in (students | run.frozen_models).items()}
    weights |= {name: model for name, model in named.items() if model.startswith(TIMM)}
    folders = tuple(s for entry in run.frozen_models.values() for s in entry.folder_schemes)
    # Code of the run's own may register models with timm.
    knows_timm = bool(run.code())
    _on_this_node(
        *(partial(require_dataset, root, where=where) for where, root in roots.items()),
        *(
            partial(require_named, source, where=where, folders=folders)
            for where, source in weights.items()
            if source not in ("", RANDOM) and not (knows_timm and source.startswith(TIMM))
        ),
    )


def require_apart(run: Run, *, fresh: bool) -> None:
    """Refuses a folder of images as a run's folder, also a parent of one if --fresh would move it.

    --fresh (`fresh`) moves an earlier run's folder out of the way.

    Raises: ConfigError: with the field of the images.
    """
    folder = Path(run.run_dir()).resolve()
    for flag, text in paths_of(run).items():
        if not text or not flag.startswith(("data.root", "eval.")):
            continue
        if local_kind(text, where=flag) != "folder":
            continue
        images = Path(text).resolve()
        if folder == images:
            wrong = f"the folder of the images of {flag}"
        elif fresh and images.is_relative_to(folder):
            wrong = f"a parent folder of {flag}, which --fresh would move"
        else:
            continue
        error = ConfigError(
            f"--runtime.run_dir: {wrong}; got {run.run_dir()}, expected a folder without images. "
            "Set --runtime.run_dir to another folder."
        )
        error.rank_local = is_first_of_node()
        raise error


def require_sources(run: Run) -> None:
    """Refuses teachers without weights; a mistyped teacher's name in a flag creates such a teacher.

    Raises: ConfigError: with a line for each teacher without weights.
    """
    models = run.frozen_models
    names = {where: where.rpartition(".")[2] for where in models}
    check_all(
        *(
            partial(
                model.require_source,
                f"--{where}.source",
                others=[names[other] for other in models if other != where],
            )
            for where, model in models.items()
        )
    )


def _on_this_node(*checks: Callable[[], None]) -> None:
    """Runs checks whose results may differ between nodes, such as checks of files.

    Raises: FDError: with the mistakes of all checks. On the first rank of each node it is marked as
        `rank_local`, so that each node prints its own message.
    """
    try:
        check_all(*checks)
    except FDError as error:
        error.rank_local = is_first_of_node()
        raise


def _require_path(flag: str, text: str) -> None:
    if text in ("", RANDOM) or doors.SCHEME.match(text) or _PATTERN.search(text):
        return
    paths = text, re.sub(r"#\w+$", "", text)  # FILE#student
    if any(path and kind_of(os.path.expanduser(path), where=flag) for path in paths):
        return
    if _CODE.search(text):
        raise ConfigError(
            f"{flag}: a file without 'module:' before it; got {text!r}, expected module:{text}. "
            "Write module: before the path."
        )
    # A single word may be a source that an installed package provides.
    if "/" in text or text not in doors.installed("sources"):
        raise ConfigError(
            f"{flag}: no such file or folder; got {text!r}, expected an existing path. Check the "
            "path."
        )
