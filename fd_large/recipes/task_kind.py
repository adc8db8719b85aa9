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
        name: Its name in a recipe (`task.name`). A task of the user's own is named there by the
            door that leads to it, and this is the name of its section alone.
        folder: Its folder in `tasks/`; empty for a task of the user's own.
        job: The class of its jobs (`TrainingJob` in engine/job.py), which the engine trains: its
            dotted name in tasks/, or the class itself for a task of the user's own. This face every
            task has; all three are imported when they are first asked for.
        stored: The class of its stored runs (`StoredRun` in tasks/stored_run.py), named as `job`;
            empty: commands export the student of such a run, and nothing else.
        transfer: The class by which its trainings begin from named models (`Transfer` in
            tasks/transfer.py), named as `job`; empty: they do not.
        title: Words for it in tables and plots; empty: its name.
        section: Dataclass of its own settings, `task.NAME.FIELD`; None if it has none.
        sections: Names of the recipe's sections that are read by this task and not by all.
        may_change: Fields of its own, section.field, that a resume may change: they do not change
            the result.
        scores_runs: Whether a stored run is scored by itself (`StoredRun.score`); `evaluate RUN`
            then does that unless another test is named.
        scoring_fields: Fields of the recipe, section.field, that such an evaluation may change,
            besides those of the images.
        predicts_scores: Whether `predict` gives each thing that it finds a score.
        trains_models: Whether `evaluate` trains named models by it and compares them
            (`Transfer.recipe_for`, `Transfer.compared`).
        depends_on_passes: Whether the images of one pass decide the result, by batch norms; then
            the micro batch does too.
        scored_files: Flags of `evaluate` that name files of results which are scored without a
            model: a dataclass whose flags are empty texts by default. The function `score_files` of
            the folder's `score_files.py` takes it.
        ignored_fields: Fields of the recipe, section.field, that no recipe of the task may set: its
            job refuses them, and pages leave them out.
        check_names: Refuses names that stand for nothing in a recipe of the task, such as that of a
            loss, as far as that shows without torch; None: what it names is found when it is made.
        metrics: The words for what evaluations of a recipe of the task measure, "SET/METRIC" ->
            words, as `TrainingJob.metrics` has them; None: only its job knows.
        lower_is_better: As `TrainingJob.lower_is_better`, for commands without torch.
        next_steps: What is worth running after a run of it: why, and the words after the program's
            name, in which {run} is the run's folder, {data.root} its images, {library} a library
            that has its student, and the word {teachers} stands for RUN#NAME of each teacher.
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
    """Refuses a metric (`eval.best_metric`) that the task does not name.

    Args:
        metric: The name in the recipe.
        known: As `TrainingJob.metrics`.

    Raises: ConfigError: with the nearest names.
    """
    names = [name.replace("/", "_") for name in known if "/" in name]
    names = [name for name in names if not name.endswith("_best_constant")]
    if metric not in names:
        raise ConfigError(
            f"eval.best_metric: no number that evaluations of this task measure; got {metric!r}, "
            f"{nearest(metric, names)}. Change --eval.best_metric."
        )
