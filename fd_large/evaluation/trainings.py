"""Protocols that train every model on labels, with every seed, each in a folder of its own."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fd_large.errors import ConfigError, without_secrets
from fd_large.evaluation import recorded_runs
from fd_large.evaluation.protocol import Pooled, Protocol, Repeated, Request, Result
from fd_large.evaluation.results import Row, finish
from fd_large.evaluation.sweep import Metric, SweepFlags, check_fields, settings_of, sweep
from fd_large.files import out_folder
from fd_large.recipes import registry
from fd_large.recipes.fields import override
from fd_large.recipes.run import Run
from fd_large.recipes.sections import RANDOM
from fd_large.recipes.stored import with_stored_ends
from fd_large.recipes.task_kind import TaskKind

if TYPE_CHECKING:
    from fd_large.engine.find_model import NamedModel


@dataclass(frozen=True, kw_only=True)
class TrainingFlags(Repeated):
    """Flags that all protocols which train models have."""

    # Name of the recipe by which all models are trained. Empty: the published recipe that fits the
    # first model; with --sweep, the recipes that fit any of the models.
    recipe: str = ""
    # DeepSpeed's JSON of the trainings, a path or a name. Empty: zero1.
    deepspeed_config: str = ""


@dataclass(frozen=True, kw_only=True)
class SweptTrainingFlags(SweepFlags, TrainingFlags):
    """Flags of protocols that train the whole model, including --sweep and its grid."""


@dataclass(frozen=True, kw_only=True)
class ProbeTrainingFlags(Pooled, TrainingFlags):
    """Flags of protocols that train a linear layer on the features of a frozen model."""


def trained_by(kind: TaskKind, *, variant: str = "cached", trains_all: bool = True) -> Protocol:
    """Returns the protocol by which the user's models are trained on a kind of task.

    Args:
        kind: The kind of task.
        variant: Value of `--protocol` that selects this protocol among those of the same name.
        trains_all: Whether the whole model is trained, which allows `--sweep`. If False, only a
            linear layer on the frozen model's features is trained.
    """
    return Protocol(
        name=kind.name,
        title=kind.title,
        measure=partial(_measure, kind),
        # One layer on a frozen model has no layer decay.
        flags=SweptTrainingFlags if trains_all else ProbeTrainingFlags,
        fields=None,
        variant=variant,
    )


def _measure(kind: TaskKind, request: Request) -> Result:
    """Trains every requested model with every seed, and writes the results.

    Args:
        kind: The kind of task on which the models are trained.
        request: The user's request.

    Returns: the results; if a training ends early, they have only an exit code.
    """
    from fd_large.engine.find_model import slug
    from fd_large.engine.predictions import Predictions
    from fd_large.ranks import distributed
    from fd_large.tasks.jobs import transfer_of

    flags, changes, models = request.flags, request.changes, request.models()
    if flags.sweep:
        check_fields(changes)
    transfer = transfer_of(kind.name)
    tried = _recipes_of(models, kind, flags, changes)
    recipes, rows = [], []
    for model, of_model in zip(models, tried, strict=True):
        for words, recipe in transfer.variants(of_model[0], getattr(flags, "pool", "auto")).items():
            recipes.append(recipe)
            rows.append(Row(model, feature=words, pool=words))
    seeds = flags.seeds_from(recipes[0].runtime.seed)
    if "runtime.run_dir" in changes and (flags.sweep or not len(rows) == flags.seeds == 1):
        raise ConfigError(
            "--runtime.run_dir: a single folder for several runs; got a sweep, or several models, "
            "features or seeds, expected one run. Set --out, which has a folder for each run."
        )

    config = flags.deepspeed_config or "zero1"
    train = partial(recorded_runs.train, deepspeed_config=config, train_run=request.train)
    if flags.sweep:
        metric = Metric("held_out_accuracy", lambda summary: transfer.compared(summary)[0])
        code, sweeps = sweep(models, tried, flags, train, changes, metric)
        if code:
            return Result(code=code)
        for row, result in zip(rows, sweeps, strict=True):
            row.sweep = result
        pairs = zip(sweeps, tried, strict=True)
        recipes = [result.best_of(of_model, changes) for result, of_model in pairs]
    for row, recipe in zip(rows, recipes, strict=True):
        first = recipes[next(i for i, other in enumerate(rows) if other.pool == row.pool)]
        row.recipe, row.unlike_first = recipe.name, recorded_runs.unlike(first, recipe)
    folder = out_folder(flags.out)
    for seed in seeds:
        for row, recipe in zip(rows, recipes, strict=True):
            # The first feature has the folder that it had when a model had only one.
            is_first = next(other for other in rows if other.model is row.model) is row
            name = row.model.label if is_first else f"{row.model.label} {row.feature}"
            where = folder / f"{slug(name)}_seed_{seed}"
            if recipe.runtime.run_dir:
                where = Path(recipe.runtime.run_dir)
            runtime = replace(recipe.runtime, run_dir=str(where), seed=seed)
            run = with_stored_ends(replace(recipe, runtime=runtime), changes)
            code, summary = train(run)
            if code:
                return Result(code=code)
            accuracy, details = transfer.compared(summary)
            tested = Predictions.read(where) if distributed.is_main() else None
            row.add(accuracy, {"run": str(where), **details}, tested and tested.predicted)
            row.labels = tested.labels if tested else row.labels
    facts: dict[str, Any] = {"settings": settings_of(flags)} if flags.sweep else {}
    root = without_secrets(recipes[0].data.root)
    return finish(folder, rows, kind.title, task=kind.name, root=root, seeds=seeds, **facts)


def _recipes_of(
    models: Sequence[NamedModel], kind: TaskKind, flags: Any, changes: Mapping[str, Any]
) -> list[list[Run]]:
    """Returns a list of recipes for each model; each recipe starts from the model's weights.

    Without --sweep, all models have the one recipe that fits the first model. With --sweep, a model
    has the recipes that fit any of the models, and the recipe that fits the model itself is first.
    If --recipe names a recipe, this recipe fits every model.

    Args:
        models: The models.
        kind: The kind of task on which they are trained.
        flags: The command's own arguments.
        changes: The fields that the user set, {full name: value}.

    Raises: ConfigError: if a recipe has another task, or does not allow a change.
    """
    fitting = [flags.recipe or _fitting(model, kind) for model in models]
    for name in fitting:
        refuse_other_task("--recipe", registry.get(name), kind.name)
    recipes = []
    for model, best in zip(models, fitting, strict=True):
        names = dict.fromkeys([best, *fitting]) if getattr(flags, "sweep", False) else fitting[:1]
        recipes.append([started_from(model, registry.get(name), changes) for name in names])
    return recipes


def _fitting(model: NamedModel, kind: TaskKind) -> str:
    """Returns the name of the published recipe of the task `kind` that fits `model` best."""
    from fd_large.tasks.jobs import transfer_of

    of_run = "" if model.section.source == RANDOM else None  # See Transfer.recipe_for.
    if model.trained_by:
        of_run = model.trained_by.run.name
    return transfer_of(kind.name).recipe_for(model.architecture, run_recipe=of_run)


def started_from(model: NamedModel, base: Run, changes: Mapping[str, Any]) -> Run:
    """Returns a recipe that starts from a model's weights, with the user's changes.

    Random weights have no layer decay unless the user sets one, because the decay of published
    recipes is for trained weights and would hardly train the lower layers. A model whose layers are
    unknown has no layer decay either.

    Args:
        model: The model from which the training starts.
        base: The recipe.
        changes: The fields that the user set, {full name: value}.

    Raises:
        ConfigError: For a field that does not exist or that the model decides, or if the user sets
            a layer decay for a model whose layers are unknown.
    """
    import torch

    from fd_large.engine.student import check_layers, has_layers, make_student
    from fd_large.tasks.jobs import transfer_of

    if model.section.source == RANDOM:
        changes = {"optim.layer_decay": 1.0, **changes}
    names = [name.removeprefix("student.") for name in changes if name.startswith("student.")]
    started = transfer_of(base.task.name).starting_from(
        override(base, {**changes, **base.optim.implied(changes)}),
        model.section,
        image_size=model.image_size,
        trained_as=model.trained_by.run.student if model.trained_by else None,
        fields=names,
    )
    # An image size that the user set is kept; the job refuses it if it does not fit the model.
    size = changes.get("data.image_size", started.data.image_size)
    started = replace(started, data=replace(started.data, image_size=size))
    if started.optim.layer_decay == 1.0 or has_layers(started.student, image_size=size):
        return started
    if "optim.layer_decay" in changes:
        with torch.device("meta"):
            check_layers(make_student(started.student, image_size=size))
    return override(started, {"optim.layer_decay": 1.0})


def refuse_other_task(flag: str, recipe: Run, task: str) -> None:
    """Refuses a recipe whose task is not `task`.

    Args:
        flag: The flag that chose the recipe, for the message.
        recipe: The recipe.
        task: Name of the expected task.

    Raises: ConfigError: if the recipe has another task.
    """
    if recipe.task.name != task:
        raise ConfigError(
            f"{flag}: not a recipe of the task {task}; got {recipe.name}, expected a recipe of "
            "that task. See python -m fd_large recipes."
        )
