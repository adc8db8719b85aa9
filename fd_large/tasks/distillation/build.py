"""Teacher, student and projection of a recipe, built and placed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from fd_large.backbones.registry import build as build_model
from fd_large.engine.student import Precision, attention_memory, build_student
from fd_large.engine.task import Task
from fd_large.errors import ConfigError, ShapeError
from fd_large.plan.parameters import shapes
from fd_large.recipes.run import Run
from fd_large.tasks.distillation.alignment import check_grids
from fd_large.tasks.distillation.placement import PlacedTeacher, place
from fd_large.tasks.distillation.task import Distillation
from fd_large.tasks.distillation.teacher import Teacher
from fd_large.weights.facts import statistics_of
from fd_large.weights.settle import statistics_of_run
from fd_large.weights.source import MODULE, open_weights

log = logging.getLogger(__name__)


def teacher_maker(run: Run) -> Callable[[], Teacher]:
    """A constructor of the recipe's teacher, with random weights."""
    architecture = run.teacher_architecture()
    # A model with a table of positions has one size; others take the student's images.
    has_table = architecture.relative_position not in (None, "none")
    fixed = architecture.image_size if architecture.absolute_position or has_table else 0
    image_size = run.objective.teacher_image_size or fixed or 0
    if image_size == run.data.image_size:
        image_size = 0

    def make() -> Teacher:
        net = build_model(
            run.teacher.model,
            run.teacher.architecture,
            initialization="official",
            attention_memory=attention_memory("auto"),
        )
        own = statistics_of_run(run.teacher) or getattr(net, "statistics", None)
        statistics = own or statistics_of(run.teacher.model, architecture)
        return Teacher(net, statistics, image_size=image_size)

    return make


def task_maker(run: Run, teacher: Callable[[Tensor], Any], width: int) -> Callable[[], Task]:
    """A constructor of the recipe's task around a teacher of that width."""

    def make() -> Task:
        return Distillation(
            build_student(run),
            teacher,
            width,
            beta=run.objective.beta,
            whitening_eps=run.objective.whitening_eps,
            interpolation=run.objective.interpolation,
        )

    return make


def parameter_sizes(run: Run) -> tuple[int, ...]:
    """Elements of each tensor of student and teacher, from models without memory; checks the grids.

    Raises: ShapeError: if student and teacher cannot be aligned.
    """
    with torch.device("meta"):
        teacher = teacher_maker(run)()
        task = task_maker(run, teacher, teacher.width)()
    size = run.data.image_size
    grids = []
    for whose, grid_of in (
        ("student", lambda: task.student.grid(size, size)),
        ("teacher", lambda: teacher.grid(size)),
    ):
        try:
            grids.append(grid_of())
        except ShapeError as error:
            raise ShapeError(f"{whose}: {error}") from None
    check_grids(*grids, interpolation=run.objective.interpolation)
    return tuple(p.numel() for net in (task, teacher) for p in net.parameters())


def teacher_weights(run: Run) -> Iterable[tuple[str, Tensor]] | None:
    """(name, tensor) of a settled run's teacher; None if it is random or brings its own.

    Reads headers only; that the file covers the model is known when this returns.

    Raises: ConfigError: if the recipe names no source; WeightsError: if the file does not fit.
    """
    source = run.teacher.source
    if source == "":
        raise ConfigError(
            f"teacher.source: {run.teacher.model} has no weights; got nothing, expected a file. "
            "Set --teacher.source PATH, or --teacher.source random for a test or a throughput run."
        )
    if source == "random" or source.startswith(MODULE):
        return None
    architecture = run.teacher_architecture()
    if architecture.family == "timm":
        # timm takes a second to import, which other teachers are spared.
        from fd_large.weights.timm_backbone import fitted

        return fitted(
            source,
            architecture.timm_name,
            stride=architecture.feature_stride,
            allow=run.teacher.allow,
            where="--teacher.source",
        )
    return open_weights(source, where="--teacher.source").fitted(
        architecture,
        shapes(architecture),
        allow=run.teacher.allow,
        where="--teacher.source",
        remedy="Set --teacher.model auto to take the model of the file, or --teacher.allow NAMES to "
        "do without.",
    )


def build_teacher(
    run: Run, precision: Precision, *, node_size: int, persistence_threshold: int
) -> PlacedTeacher:
    """The recipe's teacher where the recipe wants it; before any student engine."""
    weights = teacher_weights(run)
    if run.teacher.source == "random":
        log.warning("teacher: RANDOM weights (--teacher.source random): nothing to learn from it")
    teacher = place(
        teacher_maker(run),
        placement=run.teacher.placement,
        dtype=precision.teacher,
        seed=run.runtime.seed + 1,
        node_size=node_size,
        persistence_threshold=persistence_threshold,
        weights=weights,
        whole_first=run.teacher_architecture().family in ("timm", "module"),
    )
    log.info(
        "teacher: %s, %s, %.1f MB on this rank, hash %s",
        run.teacher.model,
        run.teacher.placement,
        teacher.held_bytes() / 1e6,
        teacher.fingerprint,
    )
    return teacher
