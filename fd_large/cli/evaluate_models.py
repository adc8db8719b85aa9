"""`evaluate` of models side by side: probes of frozen features, and training on labels."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple, cast

from tyro.conf import Positional, arg

from fd_large.atomic_files import out_folder, write_json
from fd_large.cli import recorded_runs
from fd_large.cli.arguments import AllowsCode
from fd_large.cli.output import tables
from fd_large.cli.sweep import (
    HELD_OUT,
    Sweep,
    SweepFlags,
    Trained,
    check_fields,
    divisible_part,
    finished,
    run_trials,
    trials_of,
    with_point,
)
from fd_large.errors import ConfigError, nearest
from fd_large.recipes import registry
from fd_large.recipes.fields import at_least, override, positive, require
from fd_large.recipes.run import Run
from fd_large.recipes.sections import RANDOM
from fd_large.recipes.task_kind import TaskKind
from fd_large.tasks.registry import TASKS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from fd_large.engine.find_model import NamedModel
    from fd_large.probes.measure import Method


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
_FLAGS = ("features", "pool", "batch_size")
OWN_FEATURES = "own"
# Words for them in tables.
POOLS = {"mean": "mean of patches", "cls": "class token"}
_FIELDS = (
    "data.root",
    "data.val_fraction",
    "data.cache",
    "data.cache_gb",
    "data.image_size",
    "data.workers",
    "data.max_pixels",
    "runtime.seed",
)
PROBES = {
    "knn": Test("k-NN", ("k", "temperature", *_FLAGS), _FIELDS),
    "linear": Test(
        "Linear probe", ("protocol", "seeds", "probe_rates", "probe_epochs", *_FLAGS), _FIELDS
    ),
}
TRAININGS = {
    kind.name: Test(
        kind.title,
        (
            *("seeds", "recipe", "deepspeed_config"),
            # One layer on a frozen model has no layer decay.
            *(("protocol",) if kind.name in PROBES else (f.name for f in fields(SweepFlags))),
        ),
        None,
    )
    for kind in TASKS.values()
    if kind.trains_models
}


@dataclass(frozen=True, kw_only=True)
class ModelFlags(SweepFlags, AllowsCode):
    """Flags of `evaluate` that measure models."""

    # Models to measure.
    models: Annotated[tuple[str, ...], Positional, arg(metavar="MODEL [MODEL ...]")] = ()
    # knn: k nearest neighbours of frozen features; linear: a linear probe on them; finetune: the
    # whole model learns the labels; or the task of one run that is scored as it was trained, such
    # as detection. auto: that of the first run's task, else knn.
    task: str = "auto"
    # How a linear probe is made. cached: in minutes, on features of the centre crops. official: as
    # in Feature-Distillation, on random crops, by the recipe linear_probe, through the engine.
    protocol: Literal["cached", "official"] = "cached"
    # Number of repetitions, with runtime.seed and the seeds after it; k-NN has no randomness.
    seeds: int = 1
    # Folder for summary.json, the plot, and the runs of what is trained.
    out: str = "evaluation"
    # Number of neighbours that vote.
    k: int = 20
    # A neighbour's vote is exp(cosine similarity / temperature).
    temperature: float = 0.07
    # What is measured of the student of a distillation run, or of an export of one: own, its map;
    # NAME or NAME.summary, what its head for that teacher's map or summary makes of it, where the
    # only teacher of a run is called teacher. Several are measured side by side. Other models are
    # measured by their own map.
    features: tuple[str, ...] = (OWN_FEATURES,)
    # Feature of an image of a frozen model: the mean of its patch tokens, or its class token. auto:
    # k-NN of each that the model has, a probe of the mean.
    pool: Literal["auto", "mean", "cls"] = "auto"
    # Images at a time while the model is frozen.
    batch_size: int = 256
    # Learning rates of the linear probe per 256 images; all are tried, and a held-out tenth of the
    # training images decides.
    probe_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    # Epochs of the linear probe.
    probe_epochs: int = 30
    # Recipe of what is trained; empty: the published one that fits the model.
    recipe: str = ""
    # DeepSpeed's JSON for what is trained, a path or a name; empty: zero1.
    deepspeed_config: str = ""

    def __post_init__(self) -> None:
        SweepFlags.__post_init__(self)
        AllowsCode.__post_init__(self)
        at_least("--seeds", self.seeds, 1, "repetitions")
        at_least("--k", self.k, 1, "neighbours")
        at_least("--batch_size", self.batch_size, 1, "images")
        at_least("--probe_epochs", self.probe_epochs, 1, "epochs")
        positive("--temperature", self.temperature)
        require(
            bool(self.features) and len(set(self.features)) == len(self.features),
            "--features: each at most once, and one at least",
            " ".join(self.features) or "nothing",
            f"{OWN_FEATURES}, NAME or NAME.summary of the run's teachers",
        )
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
    from fd_large.data.blocks import keep_blocks_in
    from fd_large.data.labelled import open_split
    from fd_large.kernels.precision import full_float32
    from fd_large.probes.features import Pool
    from fd_large.probes.measure import measure
    from fd_large.runtime import logs

    launch = distributed.start()
    logs.start(launch.rank)
    full_float32(distributed.device())
    keep_blocks_in(run.data.cache, run.data.cache_gb)
    data = run.data
    train = meeting.meet(lambda: open_split(data.root, "train", val_fraction=data.val_fraction))
    test = meeting.meet(
        lambda: open_split(data.root, "val", train.classes, val_fraction=data.val_fraction)
    )
    seeds = _seeds(run.runtime.seed, own.seeds)
    rows, folder = [], Path(own.out)
    heads = [_heads_of(model, own.features) for model in models]
    if own.features != (OWN_FEATURES,) and not any(heads):
        raise ConfigError(
            f"--features: none of the models has heads; got {' '.join(own.features)}, expected a "
            "run of distillation, or an export of one that has a folder heads. Leave it out."
        )
    module: Any  # A type checker does not know the methods of a backbone.
    for model, chosen in zip(models, heads, strict=True):
        module, statistics = model.build()
        module.grid(model.image_size, model.image_size)  # Refuses a size that does not fit.
        for feature, head in (chosen or {OWN_FEATURES: None}).items():
            net, prefix = module, module.num_prefix_tokens
            if head is not None:
                net = partial(head.eval().to(distributed.device()), module)
                prefix = head.prefix_tokens(module.num_prefix_tokens)
            both = task == "knn" and prefix
            automatic: list[Pool] = ["mean", "cls"] if both else ["mean"]
            label = model.label if head is None else f"{model.label}, {feature}"
            found = measure(
                net,
                statistics,
                train,
                test,
                out_folder(own.out) / "features",
                method=cast("Method", task),
                seeds=seeds,
                label=label,
                image_size=model.image_size,
                batch_size=own.batch_size,
                pools=automatic if own.pool == "auto" else [own.pool],
                workers=run.data.workers,
                max_pixels=run.data.max_pixels,
                k=own.k,
                temperature=own.temperature,
                rates=own.probe_rates,
                epochs=own.probe_epochs,
            )
            names = [f"head {feature}"] if head is not None else []
            rows += [
                _Row(
                    model,
                    one.values,
                    one.details,
                    one.predicted,
                    one.labels,
                    feature=", ".join([*names, *([POOLS[one.pool]] if len(found) > 1 else [])]),
                )
                for one in found
            ]
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
        settings=settings | {"batch_size": own.batch_size},
        classes=len(train.classes),
        training_images=len(train),
        pictures=len(test),
    )
    return distributed.leave(0)


def _heads_of(model: NamedModel, features: Sequence[str]) -> dict[str, Any]:
    """Returns what is measured of a model with heads, by the names of `--features`.

    None is its own map; nothing is listed for a model without heads.

    Raises: ConfigError: if it has heads, but not one of these.
    """
    from fd_large.tasks.jobs import heads_of

    if tuple(features) == (OWN_FEATURES,) or model.section.source == RANDOM:
        return {}
    heads = heads_of(model.trained_by, model.checkpoint or Path(model.source))
    found: dict[str, Any] = {}
    for feature in features if heads else ():
        label = feature.replace(".", "_")  # NAME.KIND
        if feature != OWN_FEATURES and label not in heads:
            raise ConfigError(
                f"--features: {model.label} has no such head; got {feature}, "
                f"{nearest(label, [OWN_FEATURES, *heads])}. Name one of these."
            )
        found[feature] = heads.get(label)
    return found


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
    from fd_large.engine.find_model import slug
    from fd_large.tasks.jobs import job_class

    if "runtime.run_dir" in changes and (own.sweep or not len(models) == own.seeds == 1):
        raise ConfigError(
            "--runtime.run_dir: one folder for several runs; got a sweep, or several models or "
            "seeds, expected one run. Set --out, in which each has a folder."
        )
    if own.sweep:
        check_fields(changes)
    config = own.deepspeed_config or "zero1"
    job = job_class(kind.name)
    bases = [
        registry.get(own.recipe or job.recipe_for(model.architecture, run_recipe=run_recipe(model)))
        for model in models
    ]
    for base in bases:
        refuse_other_task("--recipe", base, kind.name)
    recipes = [started_from(m, base, changes) for m, base in zip(models, bases, strict=True)]
    seeds = _seeds(recipes[0].runtime.seed, own.seeds)
    rows = [
        _Row(model, [], [], [], recipe=recipe.name)
        for model, recipe in zip(models, recipes, strict=True)
    ]

    def train(run: Run) -> Trained:
        code, summary = recorded_runs.train(run, config)
        return Trained(code) if code else Trained(0, *job.compared(summary))

    if own.sweep:
        code = _sweep(rows, recipes, own, train)
        if code:
            return distributed.leave(code)
    folder = out_folder(own.out)
    for seed in seeds:
        for row, recipe in zip(rows, recipes, strict=True):
            where = folder / f"{slug(row.model.label)}_seed_{seed}"
            if recipe.runtime.run_dir:
                where = Path(recipe.runtime.run_dir)
            runtime = replace(recipe.runtime, run_dir=str(where), seed=seed)
            code, accuracy, details = train(replace(recipe, runtime=runtime))
            if code:
                return distributed.leave(code)
            row.values.append(accuracy)
            row.details.append({"run": str(where), **details})
            if distributed.is_main() and (found := job.predictions(where)):
                row.predicted.append(found.predicted)
                row.labels = found.labels
    grid = {"sweep_rates": list(own.sweep_rates), "sweep_decays": list(own.sweep_decays)}
    _finish(
        folder,
        rows,
        kind.title,
        task=kind.name,
        root=recipes[0].data.root,
        seeds=seeds,
        **({"settings": {**grid, "sweep_held_out": HELD_OUT}} if own.sweep else {}),
    )
    return distributed.leave(0)


def _sweep(
    rows: Sequence[_Row], recipes: list[Run], own: ModelFlags, train: Callable[[Run], Trained]
) -> int:
    """Tries the grid for every row and puts the best into its recipe; returns the exit code."""
    from fd_large import distributed, meeting
    from fd_large.engine.find_model import slug
    from fd_large.engine.node_consistency import weights_digest
    from fd_large.runtime import logs

    logs.start(distributed.start().rank)
    images = meeting.meet(lambda: divisible_part(recipes[0].data.root))
    pairs = list(zip(rows, recipes, strict=True))
    digests = meeting.meet(
        lambda: [weights_digest(recipe.student.init, row.model.weights) for row, recipe in pairs]
    )
    folder = Path(own.out) / "sweep"
    grids = [
        trials_of(recipe, own, images=images, weights=digest, folder=folder / slug(row.model.label))
        for (row, recipe), digest in zip(pairs, digests, strict=True)
    ]
    done = sum(finished(trial) is not None for grid in grids for trial in grid)
    num_trials, num_runs = sum(map(len, grids)), len(rows) * own.seeds
    if distributed.is_main():
        tables().print(
            f"--sweep: {num_trials} trials ({done} of them done before) on nine tenths of the "
            f"training images, {' + '.join(str(len(grid)) for grid in grids)} for the models in "
            f"turn, the point of each one's recipe among them; then {num_runs} runs on all of "
            f"them: {num_trials - done + num_runs} runs in all",
            soft_wrap=True,
        )
    for place, (row, grid) in enumerate(zip(rows, grids, strict=True)):
        code, row.sweep = run_trials(grid, train)
        if code:
            return code
        winner = row.sweep.winner
        recipes[place] = with_point(recipes[place], winner.rate, winner.decay)
    return 0


def run_recipe(model: NamedModel) -> str | None:
    """Returns the name of the recipe of a named model's run, as `Job.recipe_for` takes it."""
    if model.trained_by:
        return model.trained_by.run.name
    return "" if model.section.source == RANDOM else None


def started_from(model: NamedModel, base: Run, changes: Mapping[str, Any]) -> Run:
    """Returns a recipe with other values of some fields and a named model in the student's place.

    Args:
        model: What the training starts from.
        base: The recipe.
        changes: Its fields with other values.

    Raises: ConfigError: for a field that does not exist, or that the model decides.
    """
    from fd_large.tasks.jobs import job_of

    names = [name.removeprefix("student.") for name in changes if name.startswith("student.")]
    started = job_of(override(base, changes)).starting_from(
        model.section,
        image_size=model.image_size,
        trained_as=model.trained_by.run.student if model.trained_by else None,
        fields=names,
    )
    # A side that the user set stays; the job refuses it where it does not fit the model.
    size = changes.get("data.image_size", started.data.image_size)
    return replace(started, data=replace(started.data, image_size=size))


def refuse_other_task(flag: str, recipe: Run, task: str) -> None:
    """Refuses a recipe of another task.

    Raises: ConfigError: naming the flag that chose it.
    """
    if recipe.task.name != task:
        raise ConfigError(
            f"{flag}: not one of the task {task}; got {recipe.name}, expected a recipe of that "
            "task. See python -m fd_large recipes."
        )


# ------------------------------------------------------------------------------------------------


def _seeds(first: int, count: int) -> list[int]:
    return list(range(first, first + count))


@dataclass
class _Row:
    """A row of the table.

    Attributes:
        model: What was measured.
        values: The accuracy of each seed, in per cent.
        details: More about each seed.
        predicted: The class that each seed gave to each test image, (N,), on rank 0; fewer than
            seeds where a run was made before they were kept.
        labels: (N,), the class of each test image; `NO_LABEL` where it could not be used.
        recipe: Name of the recipe that the model was trained by, if any.
        sweep: What was tried before, if anything.
        feature: Words for its feature where a model has several rows.
    """

    model: NamedModel
    values: list[float]
    details: list[dict[str, Any]]
    predicted: list[NDArray[np.int64]]
    labels: NDArray[np.int64] | None = None
    recipe: str = ""
    sweep: Sweep | None = None
    feature: str = ""

    def right(self) -> NDArray[np.bool_] | None:
        """Returns (seeds, images with a label), whether each was classified correctly."""
        import numpy as np

        if self.labels is None or len(self.predicted) < len(self.values):
            return None
        return (np.stack(self.predicted) == self.labels)[:, self.labels >= 0]


def _finish(folder: Path, rows: Sequence[_Row], title: str, **facts: Any) -> None:
    """Prints the table, draws the plot, writes summary.json and predictions.npz, on rank 0."""
    from fd_large import distributed

    if not distributed.is_main():
        return
    import torch

    from fd_large.report.comparison import draw_comparison, spread, tables_of
    from fd_large.report.evaluation_page import write_evaluation_page

    device = distributed.device()
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    summary = {
        **facts,
        "device": f"{distributed.world_size()} x {name}",
        "nets": [_as_json(row, rows[0]) | spread(row.values) for row in rows],
    }
    write_json(folder / "summary.json", summary)
    _write_predictions(folder / "predictions.npz", rows)
    plot = folder / f"{facts['task']}.png"
    draw_comparison(summary, title, plot)
    shown = tables_of(summary, title)
    how = {**facts, **facts.get("settings", {})}
    page = write_evaluation_page(
        folder / "report.html",
        title,
        shown,
        [plot],
        facts=[(k.replace("_", " "), v) for k, v in how.items() if k not in ("task", "settings")],
        below=f"{', '.join(map(_label, rows))}; {summary['device']}",
    )
    console = tables()
    for one in shown:
        console.print(one)
    console.print(f"{folder}/summary.json, {plot}, {page}", soft_wrap=True)


def _as_json(row: _Row, first: _Row) -> dict[str, Any]:
    """A row of summary.json."""
    from fd_large.probes.paired import difference

    found: dict[str, Any] = {
        "label": _label(row),
        "source": row.model.source,
        "image_size": row.model.image_size,
        "accuracy": row.values,
        "details": row.details,
    }
    if row.recipe:
        found["recipe"] = row.recipe
    if row.sweep:
        found["sweep"] = row.sweep.as_json()
    right, other = row.right(), first.right()
    if row is not first and right is not None and other is not None:
        paired = difference(right, other)
        found["difference"] = {
            "to": _label(first),
            "mean": paired.mean,
            "interval": [paired.low, paired.high],
            "is_shown": paired.is_shown,
        }
    return found


def _label(row: _Row) -> str:
    return f"{row.model.label}, {row.feature}" if row.feature else row.model.label


def _write_predictions(path: Path, rows: Sequence[_Row]) -> None:
    """Writes the test images' labels, (N,), and what was predicted of each row, (seeds, N)."""
    import numpy as np

    # Any name may be a model's, "labels" too.
    kept: dict[str, Any] = {
        f"predicted/{_label(row)}": np.stack(row.predicted)
        for row in rows
        if row.right() is not None
    }
    labels = next((row.labels for row in rows if row.labels is not None), None)
    if labels is not None:
        np.savez_compressed(path, labels=labels, **kept)
