"""The names of what stands in the folder of a run.

They stay as they are: the folders of earlier runs and the tools of users have them.
"""

from __future__ import annotations

from pathlib import Path

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
OVERWRITTEN = (
    *(DEEPSPEED, CODE, ENVIRONMENT, METRICS, EVALUATIONS, SUMMARY, PAGE),
    *(CHECKPOINTS, EVENTS, PICTURES, INCIDENTS, EVALUATED),
)
"""What a run writes after its recipe.json; in a folder that is no run's, it is somebody else's."""


def is_run(folder: Path) -> bool:
    """Whether a folder is a run's: it has a recipe, or has lost it and has checkpoints."""
    return kind_of(folder / RECIPE) is not None or any((folder / CHECKPOINTS).glob("step_*"))


def of_step(folder: Path, step: int) -> Path:
    """Returns the folder of a step, counted from 1, among the incidents or the evaluations."""
    return folder / f"{STEP}{step:08d}"
