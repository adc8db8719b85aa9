"""Recipe, weights, teacher and task become one run."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fd_large import distributed
from fd_large.distill.alignment import check_grids
from fd_large.distill.objective import Distillation
from fd_large.distill.task import Task
from fd_large.distill.teacher import Teacher
from fd_large.engine import config as ds
from fd_large.engine import partition
from fd_large.engine.activation import checkpoint_blocks, compile_blocks
from fd_large.engine.gate import StepGate
from fd_large.engine.gradients import spare_passes
from fd_large.engine.live_weights import load_weights
from fd_large.engine.optimizer import make_optimizer, parameter_groups
from fd_large.engine.sharded_teacher import PlacedTeacher, place
from fd_large.engine.start import deepspeed
from fd_large.errors import ConfigError, ShapeError
from fd_large.models.registry import build as build_net
from fd_large.plan.memory import DEFAULT_BUCKET_SIZE
from fd_large.plan.parameters import shapes
from fd_large.recipes.run import Run
from fd_large.weights.facts import statistics_of
from fd_large.weights.settle import statistics_of_run
from fd_large.weights.source import MODULE, open_weights

log = logging.getLogger(__name__)


class Precision(NamedTuple):
    """Types that the recipe left to the machine."""

    bfloat16: bool
    teacher: torch.dtype


class Engine(NamedTuple):
    """A task inside its DeepSpeed engine.

    Attributes:
        deepspeed: The engine; its module is the task.
        task: The trained Module.
        stage: ZeRO stage.
        config: The JSON that DeepSpeed got.
        gate: Before each step of the optimiser.
    """

    deepspeed: Any
    task: Task
    stage: int
    config: dict[str, Any]
    gate: StepGate


def precision_of(run: Run) -> Precision:
    """Resolves "auto": bfloat16 on GPUs, float32 on CPUs, where bfloat16 is slower."""
    on_gpu = distributed.device().type == "cuda"
    wanted = run.engine.precision
    bfloat16 = on_gpu if wanted == "auto" else wanted == "bfloat16"
    teacher = run.teacher.dtype
    as_student = torch.bfloat16 if bfloat16 else torch.float32
    return Precision(
        bfloat16,
        {"auto": as_student, "float32": torch.float32, "bfloat16": torch.bfloat16}[teacher],
    )


def node_size_of(run: Run, local_world_size: int) -> int:
    """Ranks of a node: the recipe's, else the launcher's."""
    size = run.engine.node_size or local_world_size
    if distributed.world_size() % size:
        raise ConfigError(
            f"engine.node_size: nodes of unequal size; got {size} for {distributed.world_size()} "
            "ranks, expected a divisor. Set --engine.node_size."
        )
    return size


def teacher_maker(run: Run) -> Callable[[], Teacher]:
    """A constructor of the recipe's teacher, with random weights."""
    architecture = run.teacher_architecture()
    # A net with a table of positions has one size; others take the student's images.
    has_table = architecture.relative_position not in (None, "none")
    fixed = architecture.image_size if architecture.absolute_position or has_table else 0
    image_size = run.objective.teacher_image_size or fixed or 0
    if image_size == run.data.image_size:
        image_size = 0

    def make() -> Teacher:
        net = build_net(
            run.teacher.model,
            run.teacher.architecture,
            initialization="official",
            attention_memory=attention_memory("auto"),
        )
        own = statistics_of_run(run.teacher) or getattr(net, "statistics", None)
        statistics = own or statistics_of(run.teacher.model, architecture)
        return Teacher(net, statistics, image_size=image_size)

    return make


def build_student(run: Run) -> nn.Module:
    """The recipe's student for its image size, with random weights from torch's generator."""
    architecture = run.student.architecture
    if run.student_architecture().family == "vit":
        architecture = replace(architecture, image_size=run.data.image_size)
    return build_net(
        run.student.model,
        architecture,
        initialization=run.student.initialization,
        drop_path_rate=run.student.drop_path_rate,
        size_rule=run.student.size_rule,
        residual_dtype=run.student.residual_dtype,
        attention_memory=attention_memory(run.student.attention_memory),
    )


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
    """Elements of each tensor of student and teacher, from nets without memory; checks the grids.

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

    Reads headers only; that the file covers the net is known when this returns.

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
        remedy="Set --teacher.model auto to take the net of the file, or --teacher.allow NAMES to "
        "do without.",
    )


def student_weights(run: Run) -> Iterable[tuple[str, Tensor]] | None:
    """(name, tensor) of a settled run's student from `student.init`; None for random weights.

    Raises: WeightsError: if the file does not fit the student.
    """
    if not run.student.init:
        return None
    architecture = run.student_architecture()
    size = run.data.image_size if architecture.family == "vit" else 0
    return open_weights(run.student.init, where="--student.init").fitted(
        architecture,
        shapes(architecture, image_size=size),
        allow=run.student.init_allow,
        where="--student.init",
        remedy="Name the net of the file by --student.model and --student.architecture.*, or set "
        "--student.init_allow NAMES to do without.",
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


def build_engine(
    run: Run,
    make: Callable[[], Task],
    config: dict[str, Any],
    *,
    weights: Iterable[tuple[str, Tensor]] | None = None,
    initial: Iterable[tuple[str, Tensor]] | None = None,
) -> Engine:
    """The task in its DeepSpeed engine, with exact float32 masters.

    Args:
        run: Optimiser, checkpointing, seed.
        make: Constructs the task; draws from torch's global generator only.
        config: A filled JSON.
        weights: (name, full tensor) of the whole task, on every rank; None for fresh weights.
        initial: The same of `task.student` alone.
    """
    stage = ds.stage_of(config)
    bfloat16 = config["bf16"]["enabled"]
    task = partition.build(make, config, partitioned=stage == 3, seed=run.runtime.seed)
    if weights is not None:
        load_weights(task, weights, where="--student.init")
    elif initial is not None:
        load_weights(task.student, initial, where="--student.init")
    exact = partition.to_bfloat16(task) if bfloat16 else None
    if stage < 3:
        task.to(distributed.device())
    if run.engine.compile == "blocks":
        compile_blocks(_blocks(task))
    wrapped = checkpoint_blocks(
        _blocks(task), mode=run.student.activation_checkpointing, every=run.student.checkpoint_every
    )
    if wrapped:
        log.info("activation checkpointing: %d of %d blocks", wrapped, len(_blocks(task)))
    on_gpu = distributed.device().type == "cuda" and not ds.offloads(config, "offload_optimizer")
    optimizer = make_optimizer(
        parameter_groups(task, run.optim.weight_decay), run.optim, on_gpu=on_gpu
    )
    engine, *_ = deepspeed.initialize(model=task, optimizer=optimizer, config=config)
    if exact is not None:
        partition.set_masters(task, exact)
    spare_passes(
        engine, bucket=config["zero_optimization"].get("reduce_bucket_size", DEFAULT_BUCKET_SIZE)
    )
    return Engine(engine, task, stage, config, StepGate(optimizer))


def _blocks(task: Task) -> list[nn.Module]:
    return task.student.blocks()


def attention_memory(wanted: str) -> str:
    """Resolves "auto": recomputed on GPUs, kept on CPUs, where that is faster.

    Raises: ConfigError: if the maps would have to be kept on a GPU.
    """
    on_gpu = distributed.device().type == "cuda"
    if wanted == "keep" and on_gpu:
        raise ConfigError(
            "student.attention_memory: keep would hold N x N float32 maps on the GPU; got keep, "
            "expected recompute. Set --student.attention_memory auto."
        )
    if wanted == "auto":
        return "recompute" if on_gpu else "keep"
    return wanted
