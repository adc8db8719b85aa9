"""The names of files and folders in the folder of a run.

They must not change, since earlier runs and users' tools rely on them.
"""

from __future__ import annotations

import os
from pathlib import Path

from fd_large.errors import ConfigError
from fd_large.files import kind_of

RECIPE = "recipe.json"
DEEPSPEED = "deepspeed.json"
CODE = "code.json"
ENVIRONMENT = "environment.json"
METRICS = "metrics.jsonl"
EVALUATIONS = "evaluations.jsonl"
# The folders of `evaluate` and `transfer` hold the next two as well.
SUMMARY = "summary.json"
PAGE = "report.html"
CHECKPOINTS = "checkpoints"
EVENTS = "events"
LOGS = "logs"
PICTURES = "pictures"
INCIDENTS = "incidents"
INCIDENT = "incident.json"
EVALUATED = "evaluations"
STEP = "update_"
STOP_FILE = "stop"
"""The user makes this file, and the run saves and stops."""
OVERWRITTEN = (
    *(DEEPSPEED, CODE, ENVIRONMENT, METRICS, EVALUATIONS, SUMMARY, PAGE),
    *(CHECKPOINTS, EVENTS, PICTURES, INCIDENTS, EVALUATED),
)
"""Files and folders that a run writes after its recipe.json; without one they are not a run's."""


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's: it has a recipe, or has lost it and has checkpoints."""
    return kind_of(folder / RECIPE) is not None or any((folder / CHECKPOINTS).glob("step_*"))


def refuse_links(folder: Path) -> None:
    """Refuses links in a run's folder through which the run would write or remove other files.

    A run's folder that came from elsewhere may have such links. A folder in it may still be a link,
    for example to a larger disk, unless it leads to the folder of another run.

    Raises: ConfigError: naming the first link.
    """
    run_folder = folder.resolve()
    logs = folder / LOGS
    written = [folder / name for name in (RECIPE, *OVERWRITTEN, LOGS)]
    if kind_of(logs, where="--runtime.run_dir") == "folder":
        written += [Path(entry.path) for entry in os.scandir(logs)]
    for path in written:
        kind = kind_of(path, where="--runtime.run_dir")
        if kind == "other":
            raise ConfigError(
                f"--runtime.run_dir: {path}: cannot be written; got a pipe or a device, expected a "
                "file of this run. Remove it."
            )
        if not path.is_symlink():
            continue
        target = path.resolve()
        if kind is None and path.name in (CHECKPOINTS, EVENTS, LOGS, PICTURES, INCIDENTS):
            continue  # Its disk is not mounted; nothing is written through it.
        if kind != "folder" or (run_folder not in target.parents and is_run(target.parent)):
            raise ConfigError(
                f"--runtime.run_dir: {path}: a link, through which a run would write outside of "
                f"its folder; got {target}, expected a file of this run, or a folder that no other "
                "run has. Remove the link."
            )


def of_step(folder: Path, step: int) -> Path:
    """Returns the folder of a step, counted from 1, among the incidents or the evaluations."""
    return folder / f"{STEP}{step:08d}"
