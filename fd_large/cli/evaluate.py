"""`python -m fd_large evaluate MODEL [MODEL ...] --task knn|linear|finetune --data.root FOLDER`."""

from __future__ import annotations

import gc
import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import Positional, arg

from fd_large.cli.arguments import AllowsCode, parse_with_recipe
from fd_large.cli.output import bar, out_folder, tables
from fd_large.errors import ConfigError
from fd_large.recipes import registry
from fd_large.recipes.fields import at_least, override, positive, require
from fd_large.recipes.run import Run
from fd_large.recipes.stored import read_recipe
from fd_large.tasks.registry import TASKS, kind_of

if TYPE_CHECKING:
    from fd_large.engine.find_model import NamedModel

# The command's own arguments that each test reads, besides models, task and out.
_FROZEN = ("pool", "batch_size")
TESTS = {
    "knn": ("k", "temperature", *_FROZEN),
    "linear": ("seeds", "probe_rates", "probe_epochs", *_FROZEN),
    "finetune": ("seeds", "recipe", "deepspeed_config"),
}
# Fields of a recipe that the features of a frozen model depend on.
FEATURE_FIELDS = ("data.root", "data.image_size", "data.workers", "data.max_pixels", "runtime.seed")
# Tasks whose runs are scored as they were trained, and the fields that are then not the run's own.
SCORERS = [kind.name for kind in TASKS.values() if kind.evaluated_by not in TESTS]
SCORE_FIELDS = ("data.root", "data.workers", "data.max_pixels")
# The defaults of these fields, and of those of fine-tuning where no recipe is named.
RECIPE = "finetune_clip_vit_base"


@dataclass(frozen=True, kw_only=True)
class Evaluate(AllowsCode):
    """Measure models on labelled images, side by side.

    python -m fd_large evaluate MODEL [MODEL ...] --task knn --data.root FOLDER

    FOLDER holds train/ and val/ or test/, each with a folder for each class, or with tar shards in
    which KEY.cls stands beside KEY.jpg. A MODEL is RUN (its student), RUN#teacher or RUN#scratch
    (its student with random weights); a file or folder of weights, hf:REPO, open_clip:ARCH/TAG,
    timm:NAME or module:package.file:function; or NAME=SOURCE for weights that do not show their
    model. A run that detects objects is scored on the images of COCO that it is tested on, or on
    those of another --data.root.

    Fields of a recipe (--data.image_size, --optim.epochs ...) follow as in training;
    `python -m fd_large train --help` lists them. docs/evaluation.md explains the figures.
    """

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
    # Path of DeepSpeed's JSON for fine-tuning; empty: ds_configs/zero1.json.
    deepspeed_config: str = ""
    # File in COCO's results format that is scored without a model, with --annotations and --json.
    detections: str = ""
    # COCO's ground truth for --detections.
    annotations: str = ""
    # File for the scores of --detections; empty: they are not written.
    json: str = ""

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("auto", *TESTS, *SCORERS)
        require(self.task in names, "--task: unknown test", self.task, ", ".join(names))
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


def main(arguments: list[str]) -> int:
    """Runs the command."""
    given = parse_with_recipe(Evaluate, arguments, command="evaluate", recipe=RECIPE)
    own, changes = given.own, given.fields
    if own.detections or own.annotations or own.json:
        return _score_file(own, changes)
    if not own.models:
        raise ConfigError(
            "evaluate: MODEL is missing; got none, expected a run or weights. Name one, for "
            "example runs/quickstart."
        )
    if own.task in SCORERS or (own.task == "auto" and _task_of(own.models[0]) in SCORERS):
        return _score_run(own, changes)
    from fd_large.engine.find_model import find_model
    from fd_large.tasks.jobs import job_of

    data = given.run.data
    image_size = data.image_size if "data.image_size" in changes else 0
    models = with_own_labels(
        [find_model(name, job_of, image_size=image_size) for name in own.models]
    )
    trained_by, task = models[0].trained_by, own.task
    if task == "auto" and trained_by is not None:
        task = kind_of(trained_by.task.name).evaluated_by
    if task == "finetune":
        _refuse(own, "finetune", ("models", *TESTS[task]), changes, None)
        return fine_tune(models, own, changes)
    task = task if task in TESTS else "knn"
    _refuse(own, task, ("models", *TESTS[task]), changes, FEATURE_FIELDS)
    return measure_frozen(models, task, own, given.run)


def measure_frozen(models: Sequence[NamedModel], task: str, own: Evaluate, run: Run) -> int:
    """k-NN or a linear probe on features of models as they are.

    Args:
        models: What is measured.
        task: knn or linear.
        own: How.
        run: A recipe with the images and the first seed.
    """
    from fd_large import distributed
    from fd_large.data.labelled import open_split
    from fd_large.probes.measure import measure
    from fd_large.runtime import logs

    launch = distributed.start()
    logs.start(launch.rank)
    train = distributed.together(lambda: open_split(run.data.root, "train"))
    test = distributed.together(lambda: open_split(run.data.root, "val", train.classes))
    folder = out_folder(own.out)
    count = own.seeds if task == "linear" else 1
    seeds = list(range(run.runtime.seed, run.runtime.seed + count))
    rows = []
    for model in models:
        module, statistics = model.build()
        module.grid(model.image_size, model.image_size)  # Refuses a size that does not fit.
        accuracy = measure(
            module,
            statistics,
            train,
            test,
            folder / "features",
            method=task,
            seeds=seeds,
            bar=lambda text, total, label=model.label: _bar(f"{label}: {text}", total),
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
        task=task,
        root=run.data.root,
        seeds=seeds,
        settings=settings | {"pool": own.pool, "batch_size": own.batch_size},
        classes=len(train.classes),
        training_images=len(train),
        pictures=len(test),
    )
    return distributed.leave(0)


def fine_tune(models: Sequence[NamedModel], own: Evaluate, changes: Mapping[str, Any]) -> int:
    """Trains every model with every seed through the engine, each into its own run folder.

    Args:
        models: What starts each training.
        own: How.
        changes: Fields of the recipe.

    Returns: The exit code of the first training that fails; 0 if none does.
    """
    from fd_large import distributed
    from fd_large.cli.train import train_run
    from fd_large.engine.zero import start
    from fd_large.tasks.finetuning.from_model import recipe_name, recipe_of

    folder, config = out_folder(own.out), own.deepspeed_config or _default_config()
    kept = _student_fields(changes, single=len(models) == own.seeds == 1)
    recipes = [
        recipe_of(model, override(registry.get(own.recipe or recipe_name(model)), changes), kept)
        for model in models
    ]
    first = recipes[0].runtime.seed
    seeds = list(range(first, first + own.seeds))
    rows = [_row(model, [], []) for model in models]
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
            summary = distributed.broadcast_object(json.loads(text))
            row["accuracy"].append(summary["test_top1"])
            row["details"].append({"run": str(where), "test_loss": summary["test_loss"]})
    _finish(
        folder,
        rows,
        task="finetune",
        root=recipes[0].data.root,
        seeds=seeds,
        settings={"recipe": [recipe.name for recipe in recipes]},
    )
    return distributed.leave(0)


def with_own_labels(models: Sequence[NamedModel]) -> list[NamedModel]:
    """Gives models labels that differ, also as names of folders.

    Raises: ConfigError: if a model is there twice.
    """
    if len({slug(model.label) for model in models}) < len(models):
        models = [replace(model, label=model.source) for model in models]
    if len({slug(model.label) for model in models}) < len(models):
        raise ConfigError(
            f"evaluate: a model twice; got {', '.join(model.source for model in models)}, expected "
            "different ones. Leave one out."
        )
    return list(models)


def slug(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", label).strip("_")


# ------------------------------------------------------------------------------------------------


def _refuse(
    own: Evaluate,
    what: str,
    flags: Sequence[str],
    changes: Collection[str],
    allowed: Sequence[str] | None,
) -> None:
    """Refuses what is given and not used.

    Args:
        own: The command's own arguments.
        what: What is measured, for the message.
        flags: Those of the command's own arguments that it uses.
        changes: Fields of a recipe that are given.
        allowed: Those that it uses; None: all.
    """
    given = {f.name: getattr(own, f.name) != f.default for f in fields(own)}
    unused = [name for name in given if given[name] and name not in ("task", "out", *flags)]
    expected = [f"--{name}" for name in ("out", *flags) if name != "models"]
    if allowed is not None:
        unused += [name for name in changes if name not in allowed]
        expected += [f"--{name}" for name in allowed]
    mistakes = [
        f"{'MODEL' if name == 'models' else f'--{name}'}: not used by {what}; got it, expected only"
        f" {', '.join(expected)}. Leave it out."
        for name in unused
    ]
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def _score_file(own: Evaluate, changes: Collection[str]) -> int:
    flags = ("detections", "annotations", "json")
    _refuse(own, "--detections", flags, changes, ())
    if not (own.detections and own.annotations):
        raise ConfigError(
            "--detections: scored against --annotations; got one of the two, expected both. Name "
            "both files."
        )
    if own.json and not Path(own.json).resolve().parent.is_dir():
        raise ConfigError(
            f"--json: no folder to write into; got {own.json!r}, expected a file in a folder that "
            "exists. Make the folder, or choose another."
        )
    # Without torch.
    from fd_large.atomic_files import write_json
    from fd_large.tasks.detection.scores.results import read_results
    from fd_large.tasks.detection.scores.scoring import read_ground_truth, score
    from fd_large.tasks.detection.scores.tables import classes_table, numbers_table

    scores = score(read_ground_truth(own.annotations), read_results(own.detections))
    console = tables()
    console.print(numbers_table(scores))
    console.print(classes_table(scores))
    if own.json:
        write_json(Path(own.json), scores.to_dict())
        console.print(f"written: {own.json}", soft_wrap=True)
    return 0


def _task_of(run: str) -> str:
    """The task of a run's folder; empty if it is none."""
    path = Path(run)
    return read_recipe(path, where="evaluate").task.name if (path / "recipe.json").is_file() else ""


def _score_run(own: Evaluate, changes: Mapping[str, Any]) -> int:
    """Scores one run by its own task; all ranks that were started share the work."""
    _refuse(own, "a run that is scored by its own task", ("models",), changes, SCORE_FIELDS)
    if len(own.models) > 1:
        raise ConfigError(
            f"evaluate: one run at a time is scored; got {' '.join(own.models)}, expected one. "
            "Name one."
        )
    path = Path(own.models[0])
    run = override(read_recipe(path, where="evaluate"), changes)
    if "data.root" in changes:  # Its val split, not another dataset that the run was tested on.
        run = override(run, {"eval.root": ""})
    # torch: seconds.
    from fd_large import distributed
    from fd_large.checkpoint import stream
    from fd_large.runtime import logs
    from fd_large.tasks.jobs import job_of

    launch = distributed.start()
    logs.start(launch.rank)
    reader = distributed.together(lambda: stream.newest(path, where="evaluate"))
    folder, share = out_folder(own.out), 0.0
    with bar(1) if distributed.is_main() else nullcontext(lambda text, done: None) as advance:

        def progress(done: int, total: int) -> None:
            nonlocal share
            advance(run.task.name, done / max(1, total) - share)
            share = done / max(1, total)

        scores = job_of(run).score_stored(reader, folder, progress)
    console = tables()
    for table in scores.tables:
        console.print(table)
    for file in scores.files:
        console.print(str(file), soft_wrap=True)
    return distributed.leave(0)


def _student_fields(changes: Collection[str], *, single: bool) -> list[str]:
    """The fields of the student that are given, all of which can be set for named models.

    Raises: ConfigError: for a field that the named models decide.
    """
    from fd_large.tasks.finetuning.from_model import OWN_FIELDS

    names = [name.removeprefix("student.") for name in changes if name.startswith("student.")]
    mistakes = [
        f"--student.{name}: the named models decide it; got it with --task finetune, expected of "
        f"student.* only {', '.join(OWN_FIELDS)}. Leave it out, or train: docs/evaluation.md."
        for name in names
        if name not in OWN_FIELDS
    ]
    if "runtime.run_dir" in changes and not single:
        mistakes.append(
            "--runtime.run_dir: one folder for several runs; got several models or seeds, expected "
            "one. Set --out, in which each has a folder."
        )
    if mistakes:
        raise ConfigError("\n".join(mistakes))
    return names


def _default_config() -> str:
    """The repository's JSON for one GPU or several, wherever the command was started."""
    name = Path("ds_configs") / "zero1.json"
    beside = Path(__file__).resolve().parents[2] / name
    return str(name if name.is_file() or not beside.is_file() else beside)


def _row(model: NamedModel, values: list[float], details: list[dict[str, Any]]) -> dict[str, Any]:
    """A model's part of summary.json."""
    return {
        "label": model.label,
        "source": model.source,
        "image_size": model.image_size,
        "accuracy": values,
        "details": details,
    }


def _finish(folder: Path, rows: Sequence[dict[str, Any]], **facts: Any) -> None:
    """Prints the table, draws the plot and writes summary.json, on rank 0."""
    from fd_large import distributed

    if not distributed.is_main():
        return
    import torch

    from fd_large.atomic_files import write_json
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
    draw_comparison(summary, plot)
    console = tables()
    console.print(table(summary))
    console.print(f"{folder}/summary.json, {plot}", soft_wrap=True)


@contextmanager
def _bar(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields what finished images are reported to; rank 0 shows them."""
    from fd_large import distributed

    if not distributed.is_main():
        yield lambda count: None
        return
    # This rank's images stand for all ranks'.
    with bar(-(-total // distributed.world_size())) as progress:
        progress(text, 0)
        yield lambda count: progress(text, count)
