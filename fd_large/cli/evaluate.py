"""`python -m fd_large evaluate MODEL [MODEL ...] --task knn|linear|finetune --data.root FOLDER`."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib import import_module
from pathlib import Path
from typing import Any

from fd_large import files
from fd_large.cli.arguments import parse_with_recipe
from fd_large.cli.evaluate_flags import PROBES, TRAININGS, ModelFlags
from fd_large.cli.evaluate_frozen import measure_frozen
from fd_large.cli.evaluate_trainings import train_models
from fd_large.cli.output import tables
from fd_large.cli.paths import paths_of_models, require_paths
from fd_large.errors import ConfigError
from fd_large.ranks.processes import check_workers
from fd_large.recipes import registry
from fd_large.recipes.fields import override, require
from fd_large.recipes.file_names import PAGE, RECIPE
from fd_large.recipes.run import Run
from fd_large.recipes.stored import read_recipe, run_of_checkpoint
from fd_large.recipes.task_kind import TaskKind
from fd_large.tasks.registry import TASKS, kind_of

# Fields of a recipe that scoring a run by its own task reads.
SCORING_FIELDS = ("data.root", "data.workers", "data.max_pixels")
TESTS = tuple(
    dict.fromkeys((*PROBES, *TRAININGS, *(k.name for k in TASKS.values() if k.scores_runs)))
)


_SCORED_FILES = {kind.scored_files: kind for kind in TASKS.values() if kind.scored_files}


@dataclass(frozen=True, kw_only=True)
class Evaluate(*_SCORED_FILES, ModelFlags):  # type: ignore[misc]
    """Measure models on labelled images, side by side.

    python -m fd_large evaluate MODEL [MODEL ...] --task knn --data.root FOLDER

    FOLDER holds train/ and val/ or test/, each with a folder for each class, or with tar shards in
    which KEY.cls stands beside KEY.jpg. A MODEL is RUN (its student), RUN#teacher or RUN#scratch
    (its student with random weights); a file or folder of weights, hf:REPO, open_clip:ARCH/TAG,
    timm:NAME or module:PATH/TO/FILE.py:NAME; or NAME=SOURCE for weights that do not show their
    model. A run that detects, segments or estimates depth is scored on the images that it is tested
    on, or on those of another --data.root. --sweep tries a grid of learning rates and layer decays
    before fine-tuning, for every model alike, on a held-out tenth of the training images.

    Fields of a recipe (--data.image_size, --optim.epochs ...) follow as in training;
    `python -m fd_large train --help` lists them. docs/evaluation.md explains the figures.
    """

    def __post_init__(self) -> None:
        super().__post_init__()
        names = ("auto", *TESTS)
        require(self.task in names, "--task: unknown test", self.task, ", ".join(names))


def main(arguments: list[str]) -> int:
    """Runs the command."""
    given = parse_with_recipe(
        Evaluate,
        arguments,
        command="evaluate",
        recipe=registry.FINETUNING_RECIPE,
        base_of=lambda own: scored_run(own.get("models", ()), own.get("task", "auto")),
    )
    return evaluate(given.own, given.fields, given.run)


def scored_run(models: Sequence[str], task: str) -> Run | None:
    """Returns the recipe of the run that its own task is to score, whose fields flags may change.

    Args:
        models: What is measured, as the user names it.
        task: As `--task`.

    Returns: None where something else is measured, or the recipe cannot be read, which `evaluate`
        says.
    """
    folder = run_of_checkpoint(models[0]) if models else None
    if folder is None or files.kind_of(folder / RECIPE, where="evaluate") != "file":
        return None
    with suppress(ConfigError):
        run = read_recipe(folder, where="evaluate")
        kind = run.task.kind()
        if kind and kind.scores_runs and task in ("auto", kind.name):
            return run
    return None


def evaluate(own: Evaluate, changes: Mapping[str, Any], run: Run) -> int:
    """Measures models; returns the exit code.

    Args:
        own: The command's own arguments.
        changes: Fields of a recipe that are given, by name.
        run: A recipe with these fields.

    Raises: FDError: for the user's mistakes.
    """
    for flags, scored in _SCORED_FILES.items():
        names = [field.name for field in fields(flags)]
        if any(getattr(own, name) for name in names):
            _refuse(own, f"--{names[0]}", names, changes, ())
            return _score_files(own, scored)
    check_workers(changes.get("data.workers", 0))
    if not own.models:
        raise ConfigError(
            "evaluate: MODEL is missing; got none, expected a run or weights. Name one, for "
            "example runs/quickstart."
        )
    root = {name: value for name, value in changes.items() if name == "data.root"}
    require_paths(paths_of_models(own.models) | root)
    files.check_out(own.out, where="--out", holds="folder")
    kind = TASKS.get(own.task)
    folder = run_of_checkpoint(own.models[0])
    if own.task == "auto" and files.kind_of(folder / RECIPE, where="evaluate") == "file":
        kind = kind_of(read_recipe(folder, where="evaluate").task.name)
    if kind and kind.scores_runs:
        allowed = (*SCORING_FIELDS, *kind.scoring_fields)
        _refuse(own, "a run that is scored by its own task", ("models",), changes, allowed)
        return _score_run(own, changes)
    from fd_large.engine.find_model import find_models
    from fd_large.tasks.jobs import job_of

    models = find_models(own.models, job_of, image_size=changes.get("data.image_size", 0))
    task = own.task
    if task == "auto":
        first = models[0].trained_by
        kind = kind_of(first.run.task.name) if first else None
        task = kind.name if kind and kind.name in TRAININGS else "knn"
    trains = task in TRAININGS and (task not in PROBES or own.protocol == "official")
    test = (TRAININGS if trains else PROBES)[task]
    _refuse(own, task, ("models", *test.flags), changes, test.fields)
    if trains:
        return train_models(models, TASKS[task], own, changes)
    return measure_frozen(models, task, own, run)


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
    unused = [
        name for name in given if given[name] and name not in ("task", "out", "allow_code", *flags)
    ]
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


def _score_files(own: Evaluate, kind: TaskKind) -> int:
    """Scores files of results, without a model."""
    score = import_module(f"fd_large.tasks.{kind.folder}.score_files").score_files
    shown, written = score(own)
    console = tables()
    for table in shown:
        console.print(table)
    for path in written:
        console.print(f"written: {path}", soft_wrap=True)
    return 0


def _score_run(own: Evaluate, changes: Mapping[str, Any]) -> int:
    """Scores one run by its own task; all ranks that were started share the work."""
    if len(own.models) > 1:
        raise ConfigError(
            f"evaluate: one run at a time is scored; got {' '.join(own.models)}, expected one. "
            "Name one."
        )
    path = Path(own.models[0])
    run = override(read_recipe(run_of_checkpoint(path), where="evaluate"), changes)
    if "data.root" in changes:  # Its val split, not another dataset that the run was tested on.
        run = override(run, {"eval.root": ""})
    # Importing torch takes seconds.
    from fd_large.checkpoint import stream
    from fd_large.kernels.precision import full_float32
    from fd_large.ranks import distributed
    from fd_large.report.evaluation_page import write_evaluation_page
    from fd_large.runtime import logs
    from fd_large.tasks.jobs import job_of, stored_run_of

    launch = distributed.start()
    logs.start(launch.rank)
    full_float32(distributed.device())
    reader = stream.newest_of_main(path, where="evaluate")
    scores = stored_run_of(job_of(run)).score(reader, Path(own.out))
    console = tables()
    for table in scores.tables:
        console.print(table)
    files = [*scores.files]
    if distributed.is_main():
        pictures = [file for file in files if file.suffix == ".png"]
        page = Path(own.out) / PAGE
        title = f"{run.name}: {kind_of(run.task.name).title or run.task.name}"
        files.append(write_evaluation_page(page, title, scores.tables, pictures, below=str(path)))
    for file in files:
        console.print(str(file), soft_wrap=True)
    return distributed.leave(0)
