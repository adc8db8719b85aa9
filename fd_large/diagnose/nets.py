"""A word of the user's becomes a net to look at: a run's student or teacher, or weights."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_large import distributed
from fd_large.checkpoint import store, stream
from fd_large.checkpoint.read import Reader
from fd_large.checkpoint.student import serve_runs
from fd_large.distill.teacher import Teacher
from fd_large.engine import partition
from fd_large.engine.build import task_maker, teacher_maker, teacher_weights
from fd_large.engine.live_weights import load_weights
from fd_large.errors import ConfigError, WeightsError
from fd_large.kernels.whitened_loss import whiten
from fd_large.models.statistics import IMAGENET, Statistics, normalise
from fd_large.recipes import sections
from fd_large.recipes.architectures import ARCHITECTURES, Architecture
from fd_large.recipes.run import Run
from fd_large.weights.settle import settle

TIMM, RANDOM, TEACHER_PART = "timm:", "random", "#teacher"

OBJECTIVE = "the run's own objective"
DRIFT = "change of its own map"
_DRIFT_BETA = 2.0


@dataclass(frozen=True)
class Subject:
    """A net, ready to run.

    Attributes:
        label: Its short name in pictures.
        source: As the user wrote it.
        net: Normalised images (B, 3, S, S) -> FeatureMap; in evaluation.
        statistics: By which its images are normalised.
        image_size: S, the side of the images that it gets.
        moved: Whose parameters the loss landscape moves.
        loss_words: Which loss that is.
        loss_on: uint8 images -> a function of nothing that gives the loss on them, a scalar, with
            the weights as they then are.
    """

    label: str
    source: str
    net: nn.Module
    statistics: Statistics
    image_size: int
    moved: nn.Module
    loss_words: str
    loss_on: Callable[[Tensor], Callable[[], Tensor]]


def open_subject(source: str) -> Subject:
    """Builds a net with its weights, in float32, on this process's device.

    Args:
        source: The folder of a run or of one of its checkpoints (its student, with the run's
            objective as the loss), RUN#student (the student alone), RUN#teacher; weights as
            `teacher.source` takes them; or NET=SOURCE, for weights that do not tell their net, with
            NET a name of the table of nets or timm:NAME, and SOURCE weights or `random`.

    Raises: FDError: if it cannot be had.
    """
    serve_runs()
    path = Path(source.removesuffix(TEACHER_PART))
    reader = _reader(path)
    if reader is None:
        return _of_weights(source)
    run = Run.from_dict(reader.manifest["recipe"])
    if source.endswith(TEACHER_PART):
        _require_teacher(run, source)
        run = settle(replace(run, student=replace(run.student, init="")))
        return _alone(_build_teacher(run), run.data.image_size, f"{path.name}: teacher", source)
    if not _distils(run):
        return _of_weights(source)
    return _of_run(run, reader, path, source)


def _reader(path: Path) -> Reader | None:
    """The newest checkpoint of a run, or a checkpoint by its own path; None: neither."""
    if store.manifest_of(path) is None and not store.checkpoints_of(path).is_dir():
        return None
    return stream.newest(path, where="diagnose")


def _distils(run: Run) -> bool:
    return run.task.name == "distillation"


def _require_teacher(run: Run, source: str) -> None:
    if not _distils(run):
        raise ConfigError(
            f"diagnose: {source}: this run has no teacher; got one of the task {run.task.name}, "
            "expected a distillation. Name the run alone."
        )


# --- a run ---


def _of_run(run: Run, reader: Reader, path: Path, source: str) -> Subject:
    # The student's weights come from the checkpoint; what they started from may be gone.
    try:
        run = settle(replace(run, student=replace(run.student, init="")))
        teacher = _build_teacher(run)
    except WeightsError as error:
        raise WeightsError(
            f"{error} Or name {source}#student, whose landscape does without the teacher."
        ) from error
    make = task_maker(run, teacher, teacher.width)
    task = partition.build(make, {}, partitioned=False, seed=run.runtime.seed)
    shapes = {name: tuple(p.shape) for name, p in task.named_parameters()}
    stream.check(reader, shapes)
    kind = stream.outcome(reader)
    items = ((name, stream.read(reader, name, shape, kind=kind)) for name, shape in shapes.items())
    load_weights(task, items, where="diagnose")
    task.to(distributed.device()).eval()

    def loss_on(images: Tensor) -> Callable[[], Tensor]:
        prepared = task.prepare(images, None, None)
        return lambda: task(**prepared)[0]

    return Subject(
        label=path.resolve().name,
        source=source,
        net=task.student,
        statistics=IMAGENET,
        image_size=run.data.image_size,
        moved=task,
        loss_words=OBJECTIVE,
        loss_on=loss_on,
    )


# --- weights ---


def _of_weights(source: str) -> Subject:
    named, weights = _split(source)
    teacher = sections.Teacher(source=weights)
    if named.startswith(TIMM):
        teacher = replace(teacher, model="timm", architecture=_timm(named.removeprefix(TIMM)))
    elif named:
        teacher = replace(teacher, model=named)
    run = Run(name="diagnose", student=sections.Student(model="swinv2_tiny"), teacher=teacher)
    run = settle(run)
    size = _image_size(run)
    run = replace(run, data=replace(run.data, image_size=size))
    label = _label(named, weights)
    return _alone(_build_teacher(run), size, label, source)


def _split(source: str) -> tuple[str, str]:
    """NET=SOURCE; a path may have the sign in it."""
    named, sign, weights = source.partition("=")
    if sign and (named in ARCHITECTURES or named.startswith(TIMM)):
        return named, weights
    return "", source


def _timm(name: str) -> Architecture:
    from fd_large.weights.timm_backbone import strides

    return Architecture(timm_name=name, feature_stride=max(strides(name)))


def _label(named: str, weights: str) -> str:
    if named:
        return f"{named.removeprefix(TIMM)}{', random' if weights == RANDOM else ''}"
    kind, sign, rest = weights.partition(":")
    return rest if sign else Path(kind).name


def _image_size(run: Run) -> int:
    """The side that a net was made for; the recipes' where it tells none."""
    architecture = run.teacher_architecture()
    if architecture.family == "timm":
        import timm  # A second that other nets are spared.

        return timm.get_pretrained_cfg(architecture.timm_name).input_size[-1]
    return architecture.image_size or run.data.image_size


def _build_teacher(run: Run) -> Teacher:
    weights = teacher_weights(run)
    # A random teacher is the one that the run has, whose seed this is.
    seed = run.runtime.seed + 1
    teacher = partition.build(teacher_maker(run), {}, partitioned=False, seed=seed)
    if weights is not None:
        load_weights(teacher.net, weights, where="diagnose")
    return teacher.to(distributed.device())


def _alone(teacher: Teacher, image_size: int, label: str, source: str) -> Subject:
    """A net without an objective: its loss is how far its own map moves."""
    net, statistics = teacher.net, teacher.statistics

    def loss_on(images: Tensor) -> Callable[[], Tensor]:
        pixels = normalise(images, statistics)
        with torch.no_grad():
            start = whiten(net(pixels).tokens)
        return lambda: F.smooth_l1_loss(whiten(net(pixels).tokens), start, beta=_DRIFT_BETA)

    return Subject(
        label=label,
        source=source,
        net=net,
        statistics=statistics,
        image_size=teacher.image_size or image_size,
        moved=net,
        loss_words=DRIFT,
        loss_on=loss_on,
    )
