"""Describes a task for the recipe, the command line and the report. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fd_large.errors import ConfigError, nearest

OF_FEW_LABELS = ("data.fraction", "data.per_class", "data.label_seed")
"""Fields that choose some of the labelled images; only tasks with class labels read them."""
OF_VIEWS_WITHOUT_LABELS = (
    "data.color_jitter",
    "data.grayscale_probability",
    "data.image_mixup",
    "data.image_sizes",
    "eval.views",
    "eval.knn_root",
    "eval.knn_every",
)
"""Fields of the recipe that only tasks on images without labels read."""


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """Description of a task, which each `tasks/NAME/section.py` defines as KIND.

    Attributes:
        name: Name of the task in a recipe (`task.name`). A recipe names the user's own task by
            `module:FILE.py:NAME`, and `name` is then only the name of the task's section.
        folder: Name of the task's folder in `tasks/`; "" for the user's own task.
        job: Class of the task's jobs (`TrainingJob` in engine/job.py), which the engine trains, as
            a dotted name in tasks/, or as the class itself for the user's own task. The classes
            `job`, `stored` and `transfer` are imported when they are first needed.
        stored: Class of the task's stored runs (`StoredRun` in tasks/stored_run.py), given like
            `job`; "" if commands can only export the student.
        transfer: Class by which trainings start from models that the user names (`Transfer` in
            tasks/transfer.py), as a dotted name; "" if there are no such trainings.
        title: Name of the task in tables and plots; "" to use `name`.
        section: Dataclass of the task's own settings, `task.NAME.FIELD`; None if there are none.
        sections: Names of the recipe's sections that this task reads and not all tasks read.
        may_change: Fields of the task, section.field, that a resume may change, since they do not
            affect the result.
        scores_runs: Whether the task's stored runs can be scored (`StoredRun.score`). `evaluate
            RUN` then scores the run, unless another test is named.
        scoring_fields: Fields of the recipe, section.field, that `evaluate RUN` may change, besides
            those of the images.
        predicts_scores: Whether each prediction of `predict` has a score.
        trains_models: Whether `evaluate` trains models that the user names by this task, and
            compares them (`Transfer.recipe_for`, `Transfer.compared`).
        depends_on_passes: Whether results depend on the micro-batch size, by batch norms.
        scored_files: Dataclass of flags of `evaluate` that name files of results to score without
            a model, all strings and "" by default. The function `score_files` in the folder's
            `score_files.py` scores them. None if there are no such flags.
        ignored_fields: Fields of the recipe, section.field, that a recipe of the task may not set.
            The job refuses them, and pages of recipes leave them out.
        check_names: Function that refuses unknown names in a recipe of the task, such as a loss, as
            far as possible without torch; None if names are only checked when objects are built.
        metrics: Function from a recipe to the labels of its metrics, {"SET/METRIC": label}, as
            `TrainingJob.metrics`; None if only the job knows them.
        lower_is_better: The METRICs of `metrics` for which lower is better, for commands without
            torch; for all others, higher is better.
        next_steps: Suggested commands after a run, each as a reason and arguments. In the
            arguments, {run} stands for the run's folder, {data.root} for its images, {library} for
            a format that can hold the student, and {teachers} for RUN#NAME of each teacher.
    """

    name: str
    folder: str = ""
    job: str | Callable[[Any], Any]
    stored: str | Callable[[Any], Any] = ""
    transfer: str = ""
    title: str = ""
    section: type | None = None
    sections: tuple[str, ...] = ()
    may_change: tuple[str, ...] = ()
    scores_runs: bool = False
    scoring_fields: tuple[str, ...] = ()
    predicts_scores: bool = False
    trains_models: bool = False
    depends_on_passes: bool = False
    scored_files: type | None = None
    ignored_fields: tuple[str, ...] = ()
    check_names: Callable[[Any], None] | None = None
    metrics: Callable[[Any], Mapping[str, str]] | None = None
    lower_is_better: tuple[str, ...] = ("loss",)
    next_steps: tuple[tuple[str, tuple[str, ...]], ...] = ()


def check_metric(metric: str, known: Mapping[str, str]) -> None:
    """Refuses a value of `eval.best_metric` that is not a metric of the task.

    The task's metrics are `known`, as `TrainingJob.metrics` returns them.

    Raises: ConfigError: with the nearest names of metrics.
    """
    names = [name.replace("/", "_") for name in known if "/" in name]
    names = [name for name in names if not name.endswith("_best_constant")]
    if metric not in names:
        raise ConfigError(
            f"eval.best_metric: not a metric of this task; got {metric!r}, "
            f"{nearest(metric, names)}. Change --eval.best_metric."
        )
