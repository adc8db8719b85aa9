"""`python -m fd_large evaluate A [B ...] --task knn|linear|finetune --data.root FOLDER`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Literal

import tyro

from fd_large.cli.evaluate_models import Train, finetune, measure_frozen, slug
from fd_large.cli.flags import parse_run
from fd_large.cli.predict import detects, evaluate_run
from fd_large.errors import ConfigError, nearest
from fd_large.recipes.fields import at_least, positive, require

if TYPE_CHECKING:
    from fd_large.tasks.distillation.frozen import Named

# Fields of a recipe that frozen features depend on.
FEATURE_FIELDS = ("data.root", "data.image_size", "data.workers", "data.max_pixels", "runtime.seed")
# Fields that an evaluation of boxes and masks takes; all else is the run's.
DETECTION_FIELDS = ("data.root", "data.workers", "data.max_pixels")
# Flags that each task reads; task and out are read by all.
_FEATURES = ("pool", "batch_size")
TASKS = {
    "knn": ("k", "temperature", *_FEATURES),
    "linear": ("seeds", "probe_rates", "probe_epochs", *_FEATURES),
    "finetune": ("seeds", "recipe", "deepspeed_config"),
}


@dataclass(frozen=True, kw_only=True)
class Flags:
    """Say what models are worth on labelled images, side by side.

    python -m fd_large evaluate NET [NET ...] --task knn --data.root FOLDER

    FOLDER holds train/ and val/ or test/, each with a folder for each class, or with tar shards in
    which KEY.cls stands beside KEY.jpg. A NET is RUN (its student), RUN#teacher, RUN#scratch (its
    student with random weights); a file or folder of weights, hf:REPO, open_clip:ARCH/TAG,
    timm:NAME or module:package.file:function; or NET=SOURCE for weights that do not tell their model.
    Fields of a recipe (--data.image_size, --optim.epochs ...) follow as in training.
    docs/evaluation.md says what the figures mean.
    """

    task: Literal["", "knn", "linear", "finetune", "detection"] = ""
    """Nearest neighbours, a linear probe, fine-tuning, or the boxes and masks of one run that
    detects (with --out, --data.root FOLDER in COCO's layout, --data.workers and --data.max_pixels
    alone); empty: that of the first run's recipe, else knn."""
    seeds: int = 1
    """Repetitions, runtime.seed and those after it; not of neighbours, who leave nothing to
    chance."""
    out: str = "evaluation"
    """Folder for summary.json, the image, and the runs of fine-tuning."""
    k: int = 20
    """Neighbours that vote."""
    temperature: float = 0.07
    """A neighbour's vote is exp(cosine similarity / temperature)."""
    pool: Literal["mean", "cls"] = "mean"
    """What stands for an image where the model is frozen: the mean of its patches, or CLS."""
    batch_size: int = 256
    """Images at a time where the model is frozen."""
    probe_rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    """Learning rates of the linear probe per 256 images, all tried; a held-out tenth chooses."""
    probe_epochs: int = 30
    """Passes of the linear probe over the training images."""
    recipe: str = ""
    """Settings of fine-tuning; empty: the published ones that fit the net."""
    deepspeed_config: str = ""
    """DeepSpeed's JSON for fine-tuning; empty: ds_configs/zero1.json."""
    detections: str = ""
    """A file in COCO's results format to score, without a model; with --annotations, --json."""
    annotations: str = ""
    """COCO's ground truth for --detections."""
    json: str = ""
    """Where the scores of --detections go; empty: nowhere."""
    local_rank: int = -1
    """Passed by the deepspeed launcher; ignored."""

    def __post_init__(self) -> None:
        at_least("seeds", self.seeds, 1, "repetitions")
        at_least("k", self.k, 1, "neighbours")
        at_least("batch_size", self.batch_size, 1, "images")
        at_least("probe_epochs", self.probe_epochs, 1, "passes")
        positive("temperature", self.temperature)
        require(
            bool(self.probe_rates) and min(self.probe_rates) > 0,
            "probe_rates: no learning rates",
            self.probe_rates,
            "numbers above 0",
        )


def main(arguments: list[str], *, train: Train, rank: int) -> int:
    """Runs the command.

    Args:
        arguments: Words after `evaluate`.
        train: Trains a recipe to its end; returns the exit code.
        rank: Of this process.
    """
    if not arguments or "-h" in arguments or "--help" in arguments:
        if rank == 0:
            _tyro(["--help"])
        return 0
    models, own, rest = split(arguments)
    flags = _tyro(own)
    if flags.detections or flags.annotations or flags.json:
        return _score_detections(flags, models, rest)
    if not models:
        raise ConfigError(
            "evaluate: no model; got nothing, expected a run or weights. Name one, for instance "
            "runs/quickstart."
        )
    if flags.task == "detection" or (not flags.task and detects(models[0])):
        return _detection(models, flags, rest)
    from fd_large.engine.frozen import find_model  # torch: seconds.
    from fd_large.tasks.jobs import job_of


    words, others = _parted(rest, FEATURE_FIELDS)
    run = parse_run(["--recipe", "finetune_clip_vit_base", *words])
    is_sized = any(word.partition("=")[0] == "--data.image_size" for word in words)
    image_size = run.data.image_size if is_sized else 0
    nets = [find_model(model, job_of, image_size=image_size) for model in models]
    _tell_apart(nets)
    task = flags.task or _task_of(nets[0])
    _check_flags(task, own)
    if task == "finetune":
        return finetune(nets, flags, rest, train)
    if others:
        raise ConfigError(
            f"{others[0]}: frozen features do not depend on it; got it with --task {task}, "
            f"expected {', '.join(FEATURE_FIELDS)}. Leave it out, or set --task finetune."
        )
    from fd_large.runtime import logs

    logs.start(rank)
    return measure_frozen(nets, task, flags, run)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str], list[str]]:
    """Models (the words before the first flag), this command's flags, and fields of a recipe.

    Raises: ConfigError: for a flag that is neither.
    """
    known = {f.name for f in fields(Flags)}
    models: list[str] = []
    own: list[str] = []
    rest: list[str] = []
    into = models
    for word in arguments:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            if name not in known and "." not in name:
                raise ConfigError(f"--{name}: no such flag of evaluate; {nearest(name, known)}")
            into = own if name in known else rest
            word = f"--{name}{word[2 + len(name) :]}"
        into.append(word)
    return models, own, rest


def _parted(rest: list[str], names: Sequence[str]) -> tuple[list[str], list[str]]:
    """The words of these fields, and the flags among the rest."""
    words: list[str] = []
    others: list[str] = []
    into: list[str] = []
    for word in rest:
        if word.startswith("--"):
            name = word[2:].partition("=")[0]
            into = words if name in names else []
            others += [] if into is words else [f"--{name}"]
        into.append(word)
    return words, others


def _check_flags(task: str, own: list[str]) -> None:
    """Refuses what this task would not read."""
    read = ("task", "out", "local_rank", *TASKS[task])
    for word in own:
        name = word.removeprefix("--").partition("=")[0]
        if word.startswith("--") and name not in read:
            raise ConfigError(
                f"--{name}: not read by this task; got it with --task {task}, expected "
                f"{', '.join(f'--{flag}' for flag in TASKS[task])}. Leave it out."
            )


def _tyro(words: list[str]) -> Flags:
    try:
        return tyro.cli(Flags, args=words, prog="python -m fd_large evaluate", use_underscores=True)
    except SystemExit as end:
        if end.code:
            raise ConfigError(
                "evaluate: flags that cannot be read; got "
                f"{' '.join(words)}, expected those that --help lists. Mend them."
            ) from None
        return Flags()


def _score_detections(flags: Flags, models: list[str], rest: list[str]) -> int:
    if models or rest or not (flags.detections and flags.annotations):
        raise ConfigError(
            "--detections: a file is scored by itself; got "
            f"{' '.join([*models, *rest]) or 'one of two files'}, expected --detections FILE "
            "--annotations FILE [--json OUT] and nothing else. Mend the command."
        )
    from fd_large.cli.score_detections import score_file

    return score_file(flags.detections, flags.annotations, flags.json)


def _detection(models: list[str], flags: Flags, rest: list[str]) -> int:
    words, others = _parted(rest, DETECTION_FIELDS)
    for field in fields(Flags):
        if field.name not in ("task", "out", "local_rank"):
            others += [f"--{field.name}"] if getattr(flags, field.name) != field.default else []
    if len(models) > 1 or others:
        raise ConfigError(
            f"evaluate: boxes and masks of one run; got {' '.join([*models, *others])}, expected "
            f"RUN, --out and {', '.join(f'--{name}' for name in DETECTION_FIELDS)} alone. Leave "
            "out the rest."
        )
    data = parse_run(["--recipe", "coco_mask_rcnn_vit_base", *words]).data
    given = {word[2:].partition("=")[0] for word in words if word.startswith("--")}
    changes = {name: getattr(data, name) for name in (n.removeprefix("data.") for n in given)}
    return evaluate_run(models[0], changes=changes, out=flags.out)


def _task_of(net: Named) -> str:
    """Fine-tuning of a run that fine-tuned; else what costs least."""
    if net.trained_by is not None and net.trained_by.task.name in TASKS:
        return net.trained_by.task.name
    return "knn"


def _tell_apart(nets: list[Named]) -> None:
    """Gives models labels of which no two are the same, as names of folders either."""
    if len({slug(net.label) for net in nets}) < len(nets):
        nets[:] = [replace(net, label=net.source) for net in nets]
    if len({slug(net.label) for net in nets}) < len(nets):
        raise ConfigError(
            f"evaluate: a model twice; got {', '.join(net.source for net in nets)}, expected "
            "different ones. Leave one out."
        )
