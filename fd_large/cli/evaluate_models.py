"""Rows of the table of `evaluate`: frozen models, fine-tuned models, and what came out."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fd_large.cli.flags import parse_run
from fd_large.cli.progress_output import bar, out_folder
from fd_large.errors import ConfigError, ShapeError
from fd_large.recipes.run import Run

if TYPE_CHECKING:
    from fd_large.engine.frozen import Named

Train = Callable[..., int]


@dataclass
class Score:
    """What came out for a model.

    Attributes:
        model: As the user named it.
        values: Per cent of the test images that were named rightly, one a seed.
        details: More of each seed.
    """

    net: Named
    values: list[float]
    details: list[dict[str, Any]]


# --- frozen models ---


def measure_frozen(nets: list[Named], task: str, flags: Any, run: Run) -> int:
    """Neighbours or a probe on features of a model as it is."""
    from fd_large import distributed
    from fd_large.data.labelled import open_split
    from fd_large.probes import knn, linear
    from fd_large.probes.features import extract

    distributed.start()
    train_set = distributed.together(lambda: open_split(run.data.root, "train"))
    test_set = distributed.together(lambda: open_split(run.data.root, "val", train_set.classes))
    num_classes, folder = len(train_set.classes), out_folder(flags.out)
    seeds = range(run.runtime.seed, run.runtime.seed + (flags.seeds if task == "linear" else 1))
    scores = []
    for net in nets:
        module, statistics = net.build()
        try:
            module.grid(net.image_size, net.image_size)
        except ShapeError as error:
            told = str(error).replace("--objective.teacher_image_size", "--data.image_size")
            raise ShapeError(told) from None
        found = {}
        for name, pictures in (("training", train_set), ("test", test_set)):
            with _bar(f"{net.label}: {name} features", len(pictures)) as told:
                found[name] = extract(
                    module,
                    statistics,
                    pictures,
                    folder / "features" / slug(net.label) / name,
                    image_size=net.image_size,
                    batch_size=flags.batch_size,
                    pool=flags.pool,
                    workers=run.data.workers,
                    max_pixels=run.data.max_pixels,
                    told=told,
                )
        del module
        score = Score(net, [], [])
        for seed in seeds:
            if task == "knn":
                with _bar(f"{net.label}: neighbours", len(test_set)) as told:
                    value = knn.accuracy(
                        found["training"],
                        found["test"],
                        num_classes=num_classes,
                        k=flags.k,
                        temperature=flags.temperature,
                        told=told,
                    )
                score.details.append({})
            else:
                probe = linear.Probe(rates=flags.probe_rates, epochs=flags.probe_epochs, seed=seed)
                # Every rank does all of it.
                num_images = linear.work(len(train_set), probe) * distributed.world_size()
                with _bar(f"{net.label}: probe, seed {seed}", num_images) as told:
                    outcome = linear.evaluate(
                        found["training"],
                        found["test"],
                        num_classes=num_classes,
                        probe=probe,
                        told=told,
                    )
                value = outcome.test
                score.details.append({"rate": outcome.rate, "held_out": list(outcome.held_out)})
            score.values.append(value)
        scores.append(score)
        _remove(folder / "features")
    settings = (
        {"k": flags.k, "temperature": flags.temperature}
        if task == "knn"
        else {"rates": list(flags.probe_rates), "epochs": flags.probe_epochs}
    )
    settings |= {"pool": flags.pool, "batch_size": flags.batch_size}
    facts = {"classes": num_classes, "training_images": len(train_set)}
    _finish(task, scores, list(seeds), settings, run, folder, facts | {"pictures": len(test_set)})
    return distributed.leave(0)


# --- fine-tuning ---


def finetune(nets: list[Named], flags: Any, rest: list[str], train: Train) -> int:
    """Trains every model with every seed, through the engine, each into a run folder."""
    import gc

    from fd_large import distributed
    from fd_large.engine.zero import start
    from fd_large.tasks.finetuning.from_model import recipe_name, recipe_of

    folder, config = out_folder(flags.out), flags.deepspeed_config or _default_config()
    single = len(nets) == flags.seeds == 1
    own = _student_fields(rest, single=single)
    recipes = []
    for net in nets:
        base = parse_run(["--recipe", flags.recipe or recipe_name(net), *rest])
        if base.task.name != "finetune":
            raise ConfigError(
                f"--recipe: not one of fine-tuning; got {base.name}, expected a finetune_... one. "
                "See python -m fd_large recipes."
            )
        recipes.append(recipe_of(net, base, own))
    first = recipes[0].runtime.seed
    seeds = list(range(first, first + flags.seeds))
    scores = [Score(net, [], []) for net in nets]
    for seed in seeds:
        for score, recipe in zip(scores, recipes, strict=True):
            where = folder / f"{slug(score.net.label)}_seed_{seed}"
            if recipe.runtime.run_dir:
                where = Path(recipe.runtime.run_dir)
            runtime = replace(recipe.runtime, run_dir=str(where), seed=seed)
            code = train(replace(recipe, runtime=runtime), deepspeed_config=config)
            start.forget_engines()
            gc.collect()
            if code:
                return distributed.leave(code)
            summary = distributed.broadcast_object(_summary_of(where))
            score.values.append(summary["test_top1"])
            score.details.append({"run": str(where), "test_loss": summary["test_loss"]})
    settings = {"recipe": [recipe.name for recipe in recipes]}
    _finish("finetune", scores, seeds, settings, recipes[0], folder, {})
    return distributed.leave(0)


def _summary_of(folder: Path) -> dict[str, Any]:
    """What rank 0 wrote; on the others, which may be here before it is written, nothing."""
    from fd_large import distributed

    if not distributed.is_main():
        return {}
    return json.loads((folder / "summary.json").read_text())


def _student_fields(rest: list[str], *, single: bool) -> list[str]:
    """The fields of the student among the words, all of which can be set for named models.

    Raises: ConfigError: for a field that what is named decides.
    """
    from fd_large.tasks.finetuning.from_model import OWN_FIELDS

    names = [word[2:].partition("=")[0] for word in rest if word.startswith("--")]
    own = [name.removeprefix("student.") for name in names if name.startswith("student.")]
    for name in own:
        if name not in OWN_FIELDS:
            raise ConfigError(
                f"--student.{name}: the models that are named decide it; got it with --task "
                f"finetune, expected of student.* only {', '.join(OWN_FIELDS)}. Leave it out, or "
                "train: docs/evaluation.md says how."
            )
    if "runtime.run_dir" in names and not single:
        raise ConfigError(
            "--runtime.run_dir: one folder for several runs; got several models or seeds, expected "
            "one. Set --out, in which each has a folder."
        )
    return own


def _default_config() -> str:
    """The repository's JSON for one GPU or several, wherever the command was started."""
    name = Path("ds_configs") / "zero1.json"
    beside = Path(__file__).resolve().parents[2] / name
    return str(name if name.is_file() or not beside.is_file() else beside)


# --- what comes out ---


def _finish(
    task: str,
    scores: list[Score],
    seeds: list[int],
    settings: dict[str, Any],
    run: Run,
    folder: Path,
    facts: dict[str, Any],
) -> None:
    """Table, image and summary.json, by rank 0."""
    from fd_large import distributed

    if not distributed.is_main():
        return
    import torch

    from fd_large.report.comparison import draw_comparison, spread, table
    from fd_large.runtime import terminal
    from fd_large.runtime.run_folder import write_json

    device = distributed.device()
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    summary = {
        "task": task,
        "root": run.data.root,
        "seeds": seeds,
        "settings": settings,
        "device": f"{distributed.world_size()} x {where}",
        **facts,
        "nets": [
            {
                "label": score.net.label,
                "source": score.net.source,
                "image_size": score.net.image_size,
                "accuracy": score.values,
                **spread(score.values),
                "details": score.details,
            }
            for score in scores
        ],
    }
    write_json(folder / "summary.json", summary)
    picture = folder / f"{task}.png"
    draw_comparison(summary, picture)
    console = terminal.console()
    console.print(table(summary))
    console.print(f"{folder}/summary.json, {picture}", soft_wrap=True)


def slug(label: str) -> str:
    """A label as the name of a folder."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", label).strip("_")


def _remove(folder: Path) -> None:
    """Features are as large as the data set is long."""
    import shutil

    from fd_large import distributed

    distributed.barrier()
    if distributed.is_main():
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _bar(text: str, total: int) -> Iterator[Callable[[int], None]]:
    """Yields what finished images are told to; rank 0 shows them."""
    from fd_large import distributed

    if not distributed.is_main():
        yield lambda count: None
        return
    # This rank's images stand for all ranks'.
    with bar(-(-total // distributed.world_size())) as tell:
        tell(text, 0)
        yield lambda count: tell(text, count)
