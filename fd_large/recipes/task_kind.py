"""A task's description for the recipe, the command line and the report; no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from fd_large.errors import ConfigError, nearest

OF_FEW_LABELS = ("data.fraction", "data.per_class", "data.label_seed")
"""Fields that choose some of the labelled images, which tasks of classes alone read."""
OF_VIEWS_WITHOUT_LABELS = (
    "data.color_jitter",
    "data.grayscale_probability",
    "data.image_mixup",
    "data.image_sizes",
    "eval.views",
    "eval.knn_root",
    "eval.knn_every",
)
"""Fields of the recipe that only a task whose images have no labels reads."""


@dataclass(frozen=True, kw_only=True)
class TaskKind:
    """A task's description; each `tasks/NAME/section.py` holds one, named KIND.

    Attributes:
        name: Its name in a recipe (`task.name`). A recipe names the user's own task by
            `module:FILE.py:NAME`, and then this is only the name of its section.
        folder: Its folder in `tasks/`; "" for the user's own task.
        job: The class of its jobs (`TrainingJob` in engine/job.py), which the engine trains: its
            dotted name in tasks/, or the class itself for a task of the user's own. Every task has
            one. It is imported when it is first needed, and so are `stored` and `transfer`.
        stored: The class of its stored runs (`StoredRun` in tasks/stored_run.py), named like
            `job`; "" if commands can only export the student.
        transfer: The class by which its trainings begin from named models (`Transfer` in
            tasks/transfer.py), named as `job`; empty: they do not.
        title: Its name in tables and plots; empty: `name`.
        section: Dataclass of its own settings, `task.NAME.FIELD`; None if it has none.
        sections: Names of the recipe's sections that are read by this task and not by all.
        may_change: Fields of its own, section.field, that a resume may change: they do not change
            the result.
        scores_runs: Whether its stored runs can be scored (`StoredRun.score`); `evaluate RUN` then
            scores the run, unless another test is named.
        scoring_fields: Fields of the recipe, section.field, that an evaluation may change,
            besides the images'.
        predicts_scores: Whether `predict` gives each prediction a score.
        trains_models: Whether `evaluate` trains named models by it and compares them
            (`Transfer.recipe_for`, `Transfer.compared`).
        depends_on_passes: Whether results depend on the images of a pass, by batch norms, and so
            on the micro batch.
        scored_files: Flags of `evaluate` for files of results to score without a model: a
            dataclass of strings, "" by default, for the function `score_files` in the folder's
            `score_files.py`.
        ignored_fields: Fields of the recipe, section.field, that no recipe of the task may set: its
            job refuses them, and pages leave them out.
        check_names: Refuses unknown names in a recipe of the task, such as a loss, as far as
            possible without torch; None if names are checked on construction.
        metrics: Labels of the metrics of a recipe's evaluations, "SET/METRIC" -> label, as in
            `TrainingJob.metrics`; None if only the job knows them.
        lower_is_better: As `TrainingJob.lower_is_better`, for commands without torch.
        next_steps: Suggested commands after a run: the reason, and the arguments, in which {run}
            is the run's folder, {data.root} its images, {library} a library with its student, and
            {teachers} RUN#NAME of each teacher.
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
    """Refuses a metric (`eval.best_metric`) that the task does not have.

    Args:
        metric: The name in the recipe.
        known: As `TrainingJob.metrics`.

    Raises: ConfigError: with the nearest names.
    """
    names = [name.replace("/", "_") for name in known if "/" in name]
    names = [name for name in names if not name.endswith("_best_constant")]
    if metric not in names:
        raise ConfigError(
            f"eval.best_metric: not a metric of this task; got {metric!r}, "
            f"{nearest(metric, names)}. Change --eval.best_metric."
        )
