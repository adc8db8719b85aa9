"""Names of the files and folders in the folder of a run.

The names must not change, since earlier runs and users' tools rely on them.
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
"""Name of a file that the user creates to make the run save and stop."""
OVERWRITTEN = (
    *(DEEPSPEED, CODE, ENVIRONMENT, METRICS, EVALUATIONS, SUMMARY, PAGE),
    *(CHECKPOINTS, EVENTS, PICTURES, INCIDENTS, EVALUATED),
)
"""Files and folders that a run writes after recipe.json.

In a folder without recipe.json, they do not belong to a run.
"""


def is_run(folder: Path) -> bool:
    """Whether `folder` is the folder of a run, because it has a recipe.json or a checkpoint."""
    return kind_of(folder / RECIPE) is not None or any((folder / CHECKPOINTS).glob("step_*"))


def refuse_links(folder: Path) -> None:
    """Refuses symbolic links through which a run would write or remove files outside its folder.

    A run's folder that came from elsewhere may contain such links. A subfolder may be a link, for
    example to a larger disk, unless the link leads to the folder of another run.

    Raises: ConfigError: with the first refused link, or with a pipe or device in place of a file.
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
                f"--runtime.run_dir: {path}: cannot be written; got a pipe or a device, expected "
                "a file of this run. Remove this path."
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
    """Returns the subfolder of a step, counted from 1, in a run's incidents or evaluations."""
    return folder / f"{STEP}{step:08d}"
