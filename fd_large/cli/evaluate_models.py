"""`evaluate` of models side by side: probes of frozen features, and training on labels."""

from __future__ import annotations

import gc
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

from tyro.conf import Positional, arg

from fd_large.atomic_files import out_folder, write_json
from fd_large.cli.arguments import AllowsCode
from fd_large.cli.output import tables
from fd_large.errors import ConfigError
from fd_large.recipes import registry
from fd_large.recipes.fields import at_least, override, positive, require
from fd_large.recipes.run import Run
from fd_large.recipes.sections import RANDOM
from fd_large.recipes.task_kind import TaskKind
from fd_large.tasks.registry import TASKS

if TYPE_CHECKING:
    from fd_large.engine.find_model import NamedModel


class Test(NamedTuple):
    """A test that --task names.

    Attributes:
        title: Words for it in tables and plots.
        flags: The command's own arguments that it reads, besides models, task and out.
        fields: Fields of a recipe that it reads; None: all.
    """

    title: str
    flags: tuple[str, ...]
    fields: tuple[str, ...] | None


# What the features of a frozen model depend on.
_FLAGS = ("pool", "batch_size")
_FIELDS = ("data.root", "data.image_size", "data.workers", "data.max_pixels", "runtime.seed")
PROBES = {
    "knn": Test("k-NN", ("k", "temperature", *_FLAGS), _FIELDS),
    "linear": Test("Linear probe", ("seeds", "probe_rates", "probe_epochs", *_FLAGS), _FIELDS),
}
TRAININGS = {
    kind.name: Test(kind.title, ("seeds", "recipe", "deepspeed_config"), None)
    for kind in TASKS.values()
    if kind.trains_models
}


@dataclass(frozen=True, kw_only=True)
class ModelFlags(AllowsCode):
    """Flags of `evaluate` that measure models."""

    # Models to measure.
    models: Annotated[tuple[str, ...], Positional, arg(metavar="MODEL [MODEL ...]")] = ()
    # knn: k nearest neighbours of frozen features; linear: a linear probe on them; finetune: the
    # whole model learns the labels; or the task of one run that is scored as it was trained, such
    # as detection. auto: that of the first run's task, else knn.
    task: str = "auto"
    # Number of repetitions, with runtime.seed and the seeds after it; k-NN has no randomness.
    seeds: int = 1
    # Folder for summary.json, the plot, and the runs of fine-tuning.
    out: str = "evaluation"
    # Number of neighbours that vote.
    k: int = 20
    # A neighbour's vote is exp(cosine similarity / temperature).
    temperature: float = 0.07
    # Feature of an image of a frozen model: the mean of its patch tokens, or its class token.
    pool: Literal["mean", "cls"] = "mean"
    # Images at a time while the model is frozen.
    batch_size: int = 256
    # Learning rates of the linear probe per 256 images; all are tried, and a held-out tenth of the
    # training images decides.
    probe_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    # Epochs of the linear probe.
    probe_epochs: int = 30
    # Recipe of fine-tuning; empty: the published one that fits the model.
    recipe: str = ""
    # DeepSpeed's JSON for fine-tuning, a path or a name; empty: zero1.
    deepspeed_config: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("--seeds", self.seeds, 1, "repetitions")
        at_least("--k", self.k, 1, "neighbours")
        at_least("--batch_size", self.batch_size, 1, "images")
        at_least("--probe_epochs", self.probe_epochs, 1, "epochs")
        positive("--temperature", self.temperature)
        require(
            bool(self.probe_rates) and min(self.probe_rates) > 0,
            "--probe_rates: invalid learning rates",
            self.probe_rates,
            "numbers above 0",
        )


def measure_frozen(models: Sequence[NamedModel], task: str, own: ModelFlags, run: Run) -> int:
    """k-NN or a linear probe on features of models as they are.

    Args:
        models: What is measured.
        task: knn or linear.
        own: How.
        run: A recipe with the images and the first seed.
    """
    from fd_large import distributed, meeting
    from fd_large.data.labelled import open_split
    from fd_large.kernels.precision import full_float32
    from fd_large.probes.measure import measure
    from fd_large.runtime import logs

    launch = distributed.start()
    logs.start(launch.rank)
    full_float32(distributed.device())
    train = meeting.meet(lambda: open_split(run.data.root, "train"))
    test = meeting.meet(lambda: open_split(run.data.root, "val", train.classes))
    seeds = _seeds(run.runtime.seed, own.seeds)
    rows, folder = [], Path(own.out)
    for model in models:
        module, statistics = model.build()
        module.grid(model.image_size, model.image_size)  # Refuses a size that does not fit.
        accuracy = measure(
            module,
            statistics,
            train,
            test,
            out_folder(own.out) / "features",
            method=task,
            seeds=seeds,
            label=model.label,
            image_size=model.image_size,
            batch_size=own.batch_size,
            pool=own.pool,
            workers=run.data.workers,
            max_pixels=run.data.max_pixels,
            k=own.k,
            temperature=own.temperature,
            rates=own.probe_rates,
            epochs=own.probe_epochs,
        )
        rows.append(_row(model, accuracy.values, accuracy.details))
    settings = (
        {"k": own.k, "temperature": own.temperature}
        if task == "knn"
        else {"rates": list(own.probe_rates), "epochs": own.probe_epochs}
    )
    _finish(
        folder,
        rows,
        PROBES[task].title,
        task=task,
        root=run.data.root,
        seeds=seeds,
        settings=settings | {"pool": own.pool, "batch_size": own.batch_size},
        classes=len(train.classes),
        training_images=len(train),
        pictures=len(test),
    )
    return distributed.leave(0)


def train_models(
    models: Sequence[NamedModel], kind: TaskKind, own: ModelFlags, changes: Mapping[str, Any]
) -> int:
    """Trains every model with every seed through the engine, each into its own run folder.

    Args:
        models: What starts each training.
        kind: The task.
        own: How.
        changes: Fields of the recipe.

    Returns: The exit code of the first training that fails; 0 if none does.
    """
    from fd_large import distributed
    from fd_large.cli.train import train_run
    from fd_large.engine.find_model import slug
    from fd_large.engine.zero import start
    from fd_large.tasks.jobs import job_class

    if "runtime.run_dir" in changes and not len(models) == own.seeds == 1:
        raise ConfigError(
            "--runtime.run_dir: one folder for several runs; got several models or seeds, expected "
            "one. Set --out, in which each has a folder."
        )
    config = own.deepspeed_config or "zero1"
    job = job_class(kind.name)
    recipes = [
        _recipe_of(
            model,
            registry.get(
                own.recipe or job.recipe_for(model.architecture, run_recipe=_run_recipe(model))
            ),
            kind,
            changes,
        )
        for model in models
    ]
    folder, seeds = out_folder(own.out), _seeds(recipes[0].runtime.seed, own.seeds)
    rows = [
        _row(model, [], []) | {"recipe": recipe.name}
        for model, recipe in zip(models, recipes, strict=True)
    ]
    for seed in seeds:
        for row, recipe in zip(rows, recipes, strict=True):
            where = folder / f"{slug(row['label'])}_seed_{seed}"
            if recipe.runtime.run_dir:
                where = Path(recipe.runtime.run_dir)
            runtime = replace(recipe.runtime, run_dir=str(where), seed=seed)
            code = train_run(replace(recipe, runtime=runtime), deepspeed_config=config)
            start.forget_engines()
            gc.collect()
            if code:
                return distributed.leave(code)
            # Rank 0 wrote it; the others may be here before it is written.
            text = (where / "summary.json").read_text() if distributed.is_main() else "{}"
            accuracy, details = job.compared(distributed.broadcast_object(json.loads(text)))
            row["accuracy"].append(accuracy)
            row["details"].append({"run": str(where), **details})
    _finish(
        folder,
        rows,
        kind.title,
        task=kind.name,
        root=recipes[0].data.root,
        seeds=seeds,
    )
    return distributed.leave(0)


# ------------------------------------------------------------------------------------------------


def _run_recipe(model: NamedModel) -> str | None:
    """As `Job.recipe_for` takes it."""
    if model.trained_by:
        return model.trained_by.run.name
    return "" if model.section.source == RANDOM else None


def _recipe_of(model: NamedModel, base: Run, kind: TaskKind, changes: Mapping[str, Any]) -> Run:
    """A recipe with the given fields and a named model in the student's place."""
    from fd_large.tasks.jobs import job_of

    if base.task.name != kind.name:
        raise ConfigError(
            f"--recipe: not one of the task {kind.name}; got {base.name}, expected a recipe of "
            "that task. See python -m fd_large recipes."
        )
    names = [name.removeprefix("student.") for name in changes if name.startswith("student.")]
    return job_of(override(base, changes)).starting_from(
        model.section,
        image_size=model.image_size,
        trained_as=model.trained_by.run.student if model.trained_by else None,
        fields=names,
    )


def _seeds(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


def _row(model: NamedModel, values: list[float], details: list[dict[str, Any]]) -> dict[str, Any]:
    """A model's part of summary.json."""
    return {
        "label": model.label,
        "source": model.source,
        "image_size": model.image_size,
        "accuracy": values,
        "details": details,
    }


def _finish(folder: Path, rows: Sequence[dict[str, Any]], title: str, **facts: Any) -> None:
    """Prints the table, draws the plot and writes summary.json, on rank 0."""
    from fd_large import distributed

    if not distributed.is_main():
        return
    import torch

    from fd_large.report.comparison import draw_comparison, spread, table

    device = distributed.device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    summary = {
        **facts,
        "device": f"{distributed.world_size()} x {name}",
        "nets": [row | spread(row["accuracy"]) for row in rows],
    }
    write_json(folder / "summary.json", summary)
    plot = folder / f"{facts['task']}.png"
    draw_comparison(summary, title, plot)
    console = tables()
    console.print(table(summary, title))
    console.print(f"{folder}/summary.json, {plot}", soft_wrap=True)
