"""The command `fd-large evaluate MODEL [MODEL ...] --task TASK`, which measures models."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, fields
from importlib import import_module
from itertools import pairwise
from typing import Annotated, Any, Literal

from tyro.conf import Positional, arg

from fd_large import doors, files
from fd_large.cli import train
from fd_large.cli.arguments import AllowsCode, parse_with_recipe
from fd_large.cli.output import show
from fd_large.cli.paths import paths_of_models, require_paths
from fd_large.errors import ConfigError
from fd_large.evaluation.protocol import Protocol, Request
from fd_large.evaluation.registry import PROTOCOLS, protocol_of
from fd_large.evaluation.scored_runs import scored_by
from fd_large.ranks.processes import check_workers
from fd_large.recipes import registry
from fd_large.recipes.file_names import RECIPE
from fd_large.recipes.run import Run
from fd_large.recipes.stored import read_recipe, run_of_checkpoint
from fd_large.recipes.task_kind import TaskKind
from fd_large.tasks.registry import TASKS, kind_of

_SCORED_FILES = {kind.scored_files: kind for kind in TASKS.values() if kind.scored_files}
_FLAGS = tuple(dict.fromkeys(one.flags for one in PROTOCOLS if one.command == "evaluate"))
# The classes of flags without those that another one inherits.
_MOST_SPECIAL = [one for one in _FLAGS if not any(one in other.__mro__[1:] for other in _FLAGS)]


@dataclass(frozen=True, kw_only=True)
class Evaluate(*_SCORED_FILES, *_MOST_SPECIAL, AllowsCode):  # type: ignore[misc]
    """Measure models on labelled images, side by side.

    python -m fd_large evaluate MODEL [MODEL ...] --task knn --data.root FOLDER

    FOLDER has train/, and val/ or test/. Each of these holds a folder for each class, or tar shards
    in which KEY.cls is next to KEY.jpg.

    A MODEL may be a model of a run, whose folder is RUN: RUN is the student, RUN#teacher the
    teacher, and RUN#scratch the student with random weights. Or a MODEL may be a source of weights:
    a file, a folder, hf:REPO, open_clip:ARCH/TAG, timm:NAME or module:PATH/TO/FILE.py:NAME. If
    weights do not show their model, the model's name is put before their source, NAME=SOURCE.

    A run of detection, segmentation or depth is scored on its own test images, or on another
    --data.root. Before fine-tuning, --sweep tries the same grid of learning rates and layer decays
    for every model, and tests each trial on a held-out tenth of the training images.

    Fields of a recipe (--data.image_size, --optim.epochs ...) are flags, as in training.
    docs/evaluation.md explains the figures.
    """

    # Models to measure.
    models: Annotated[tuple[str, ...], Positional, arg(metavar="[MODEL ...]")] = ()
    # What is measured. knn: k nearest neighbours of frozen features. linear: a linear probe on
    # frozen features. zeroshot: zero-shot classification, by class names that the text tower of a
    # CLIP teacher embeds. robustness: a fine-tuned model on a test set whose labels are mapped to
    # the model's classes. finetune: training of the whole model on the labels. The task of a run,
    # such as detection: the score of that run. auto: the measurement for the task of the first
    # model's run, else knn. A protocol of your own: module:FILE.py:NAME (docs/extending.md).
    task: str = "auto"
    # Kind of linear probe. cached: on stored features of the centre crops, which takes minutes.
    # official: on random crops, as in Feature-Distillation, by a training with the recipe
    # linear_probe.
    protocol: Literal["cached", "official"] = "cached"
    # Folder for summary.json, the plot, and the run folders of trainings.
    out: str = "evaluation"

    def __post_init__(self) -> None:
        for base in type(self).__mro__:  # Each base class checks its own flags.
            check = vars(base).get("__post_init__")
            if check and base is not Evaluate:
                check(self)
        if self.task != "auto":
            protocol_of(self.task, self.protocol)


def main(arguments: list[str]) -> int:
    """Measures models by `arguments`, those after `evaluate`; returns the exit code."""
    tasks = [later for flag, later in pairwise(arguments) if flag == "--task"]
    tasks += [word.removeprefix("--task=") for word in arguments if word.startswith("--task=")]
    parsed = parse_with_recipe(
        with_flags_of(tasks[-1] if tasks else "auto"),
        arguments,
        command="evaluate",
        recipe=registry.FINETUNING_RECIPE,
        base_of=lambda options: scored_run(options.get("models", ()), options.get("task", "auto")),
    )
    return evaluate(parsed.own, parsed.fields, parsed.run)


def with_flags_of(task: str) -> type[Evaluate]:
    """Returns the dataclass of the command's arguments, with the flags of the protocol `task`.

    `Evaluate` already has the flags of the package's protocols. For a protocol of the user's own or
    of an installed plugin, a subclass adds its flags.

    Raises: ConfigError: if the protocol does not exist.
    """
    others = doors.is_own(task) or task in doors.installed("protocols")
    if not others or issubclass(Evaluate, flags := protocol_of(task).flags):
        return Evaluate

    @dataclass(frozen=True, kw_only=True)
    class WithOwn(Evaluate, flags):  # type: ignore[misc, valid-type]
        __doc__ = Evaluate.__doc__

    return WithOwn


def scored_run(models: Sequence[str], task: str) -> Run | None:
    """Returns the recipe of the first model's run, if the run's own task is to score it, else None.

    The recipe is the base whose fields the flags may change. The result is also None if the recipe
    cannot be read, a mistake that `evaluate` reports later. `task` is the value of --task.
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


def evaluate(options: Evaluate, changes: Mapping[str, Any], run: Run) -> int:
    """Measures models; returns the exit code. The arguments are those of `measured`.

    Raises: FDError: for the user's mistakes.
    """
    for flags, scored in _SCORED_FILES.items():
        names = [field.name for field in fields(flags)]
        if any(getattr(options, name) for name in names):
            _refuse(options, f"--{names[0]}", names, changes, ())
            return _score_files(options, scored)
    check_workers(changes.get("data.workers", 0))
    if not options.models:
        raise ConfigError(
            "evaluate: MODEL is missing; got no model, expected a run or weights. Name a model, "
            "for example runs/quickstart."
        )
    root = {name: value for name, value in changes.items() if name == "data.root"}
    require_paths(paths_of_models(options.models) | root)
    files.check_out(options.out, where="--out", holds="folder")
    if options.task == "auto":
        protocol = _protocol_of_run(options)
    else:
        protocol = protocol_of(options.task, options.protocol)
    names = ["models", *(field.name for field in fields(protocol.flags))]
    if sum(known.name == protocol.name for known in PROTOCOLS) > 1:
        names.append("protocol")
    _refuse(options, protocol.name, names, changes, protocol.fields)
    return measured(protocol, options, changes, run)


def measured(
    protocol: Protocol, options: Any, changes: Mapping[str, Any], run: Run | None = None
) -> int:
    """Measures models by a protocol and prints the results; returns the exit code.

    Args:
        protocol: The protocol.
        options: The command's own arguments.
        changes: The fields of a recipe that the user set, {full name: value}.
        run: The recipe with these fields; None for a command without a recipe.
    """
    outcome = protocol.measure(Request(protocol, options, changes, run, train.train_run))
    from fd_large.ranks import distributed

    show(outcome.tables, outcome.files)
    return distributed.leave(outcome.code)


# ------------------------------------------------------------------------------------------------


def _protocol_of_run(options: Evaluate) -> Protocol:
    """Returns the protocol that `--task auto` stands for.

    If the first model of `options` is a run whose task scores runs, the protocol scores this run.
    If the run's task cannot score runs, but can train other models, the protocol trains the models
    on this task. In all other cases the protocol is k-NN.
    """
    folder = run_of_checkpoint(options.models[0].removesuffix("#scratch"))
    if files.kind_of(folder / RECIPE, where="evaluate") == "file":
        kind = kind_of(read_recipe(folder, where="evaluate").task.name)
        if kind.scores_runs:
            return scored_by(kind)
        if kind.trains_models:
            return protocol_of(kind.name, options.protocol)
    return PROTOCOLS[0]


def _refuse(
    options: Evaluate,
    label: str,
    flags: Sequence[str],
    changes: Collection[str],
    allowed: Sequence[str] | None,
) -> None:
    """Refuses flags that the user gave and the protocol does not use.

    Args:
        options: The command's own arguments.
        label: The protocol in words, for the message.
        flags: Names of the command's own arguments that the protocol uses.
        changes: Names of the recipe's fields that the user set.
        allowed: Names of the recipe's fields that the protocol uses; None for all.

    Raises: ConfigError: with a line for each unused flag.
    """
    changed = {f.name: getattr(options, f.name) != f.default for f in fields(options)}
    unused = [
        name
        for name in changed
        if changed[name] and name not in ("task", "out", "allow_code", *flags)
    ]
    expected = [f"--{name}" for name in ("out", *flags) if name != "models"]
    if allowed is not None:
        unused += [name for name in changes if name not in allowed]
        expected += [f"--{name}" for name in allowed]
    mistakes = [
        f"{'MODEL' if name == 'models' else f'--{name}'}: not used by {label}; got the flag, "
        f"expected only {', '.join(expected)}. Leave it out."
        for name in unused
    ]
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def _score_files(options: Evaluate, kind: TaskKind) -> int:
    """Scores files of predictions, named in `options`, by a task's metrics; prints the results."""
    score = import_module(f"fd_large.tasks.{kind.folder}.score_files").score_files
    shown, written = score(options)
    show(shown, [f"written: {path}" for path in written])
    return 0
