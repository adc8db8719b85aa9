"""A run from recipe to summary: every check before anything heavy, then build, resume, train."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fd_large import distributed
from fd_large.checkpoint.student import serve_runs
from fd_large.data.loader import build_loader
from fd_large.data.sampler import check_batch_sizes, updates_per_epoch
from fd_large.data.source import PictureSource, open_pictures
from fd_large.data.staging import stage
from fd_large.distill.task import Task
from fd_large.engine import config as ds
from fd_large.engine import micro_batch, same_everywhere, start
from fd_large.engine.build import (
    Engine,
    Precision,
    build_engine,
    build_teacher,
    node_size_of,
    parameter_sizes,
    precision_of,
    student_weights,
    task_maker,
    teacher_weights,
)
from fd_large.engine.checkpoints import Checkpoints
from fd_large.engine.ema import Ema
from fd_large.engine.evaluation import Evaluation
from fd_large.engine.forward import probe_phases
from fd_large.engine.layer_rates import by_layer
from fd_large.engine.loop import Evaluate, Plan, Trainer
from fd_large.engine.schedule import CosineSchedule
from fd_large.engine.sharded_teacher import PlacedTeacher
from fd_large.engine.time_box import TimeBox
from fd_large.errors import DataError, FDError
from fd_large.launch import Launch
from fd_large.recipes.run import Run
from fd_large.runtime import logs
from fd_large.runtime.hooks import (
    DONE,
    GUARD,
    NOT_SAVED,
    PREEMPTED,
    TEACHER_CHANGED,
    Hook,
    Setting,
)
from fd_large.runtime.run_folder import open_folder, source_commit, status_of, write_environment
from fd_large.weights.settle import settle

log = logging.getLogger(__name__)

EXIT_CODES = {DONE: 0, PREEMPTED: 75, NOT_SAVED: 75, GUARD: 3, TEACHER_CHANGED: 3}
"""75: the last checkpoint stands, the same command goes on from it. 3: somebody has to look."""


class Opened(NamedTuple):
    """A run with everything built and nothing trained or restored yet."""

    run: Run
    folder: Path
    launch: Launch
    source: PictureSource
    engine: Engine
    teacher: PlacedTeacher
    checkpoints: Checkpoints
    micro_batch_size: int
    ema: Ema | None

    @property
    def accumulation(self) -> int:
        """Micro batches per update."""
        share = self.run.batch.global_batch_size // self.launch.world_size
        return share // self.micro_batch_size


def open_run(run: Run, *, deepspeed_config: str, fresh: bool = False) -> Opened:
    """Checks everything, then builds teacher, student and engine on all ranks.

    Raises: FDError: for the user's mistakes, before anything heavy where that is possible.
    """
    launch = distributed.start()
    _share_cores(launch.local_world_size)
    # What a weights file decides (net, window, statistics) is part of the recipe from here on.
    serve_runs()
    settled = distributed.together(lambda: settle(run))
    # A source that still trains may show ranks different checkpoints.
    run = distributed.broadcast_object(settled)
    checked = distributed.together(lambda: _check(run, deepspeed_config, launch))
    source, precision, node_size, sizes, share, fill = checked
    same_everywhere.check(run, source)
    source = stage(source, run.data.stage_to)
    fixed = run.batch.micro_batch_size
    config = fill(1 if fixed == "auto" else fixed)

    folder = open_folder(run, fresh=fresh)
    logs.set_up(folder)
    start.start()
    threshold = _persistence(run, config, sizes)
    with micro_batch.building_in_memory():
        teacher = build_teacher(
            run, precision, node_size=node_size, persistence_threshold=threshold
        )
    make_task = task_maker(run, teacher, teacher.width)
    size = fixed
    if size == "auto":
        size = _probed(run, make_task, config, folder, share)
    config = fill(size)
    write_environment(folder, config, launch.launcher)

    with micro_batch.building_in_memory():
        engine = build_engine(run, make_task, config)
    facts = {
        "teacher_source": run.teacher.source,
        "teacher_hash": teacher.fingerprint,
        "pictures": source.fingerprint,
        "commit": distributed.broadcast_object(source_commit()),
    }
    checkpoints = Checkpoints(folder, run, engine, facts)
    # Before any resume, which restores the average too.
    ema = Ema(engine, run.optim.ema_decay) if run.optim.ema_decay else None
    return Opened(run, folder, launch, source, engine, teacher, checkpoints, size, ema)


def train(run: Run, *, deepspeed_config: str, fresh: bool, hooks: Sequence[Hook]) -> int:
    """Trains a recipe to its end; returns the exit code.

    Args:
        run: The resolved recipe.
        deepspeed_config: Path of the DeepSpeed JSON.
        fresh: Start over instead of resuming; the old run's files are moved aside.
        hooks: Asked after every update.

    Raises: FDError: for the user's mistakes, before training where that is possible.
    """
    opened = open_run(run, deepspeed_config=deepspeed_config, fresh=fresh)
    run = opened.run
    folder, engine, teacher, source = opened.folder, opened.engine, opened.teacher, opened.source
    per_epoch = updates_per_epoch(len(source), run.batch.global_batch_size)
    total = run.optim.max_steps or run.optim.epochs * per_epoch
    opened.checkpoints.sweep()
    first = opened.checkpoints.resume()
    time_box = None
    if run.optim.max_seconds:
        time_box = TimeBox(
            run.optim.max_seconds, folder, total, first=first, evaluate_every=run.eval.every
        )
        if (decided := time_box.decided()) is not None:
            total, time_box = decided, None
    size, launch = opened.micro_batch_size, opened.launch
    setting = Setting(
        folder,
        run,
        first,
        total,
        size,
        opened.accumulation,
        launch.world_size,
        checkpoint_bytes=opened.checkpoints.bytes,
        checks={
            "teacher_shard": teacher.shard_hash,
            "teacher_map": lambda: teacher.map_of_fixed_images(run.data.image_size),
        },
        name_of=source.__getitem__,
    )
    if first >= total and distributed.broadcast_object(status_of(folder) == DONE):
        log.info("%s: finished after %d updates; nothing to do", folder, first)
        return 0
    if first:
        log.info("resumed after update %d of %d", first, total)
    opened.checkpoints.say_what_disk_it_takes(total)
    peak, warmup_start, minimum = run.optim.rates(run.batch.global_batch_size)
    schedule = CosineSchedule(
        peak, warmup_start, minimum, total, int(run.optim.warmup_epochs * per_epoch)
    )

    def batches(epoch: int, first_update: int) -> Any:
        return build_loader(
            source,
            seed=run.runtime.seed,
            epoch=epoch,
            first_update=first_update,
            global_batch_size=run.batch.global_batch_size,
            micro_batch_size=size,
            rank=launch.rank,
            world_size=launch.world_size,
            image_size=run.data.image_size,
            min_crop_scale=run.data.min_crop_scale,
            workers=run.data.workers,
            color_jitter=run.data.color_jitter,
            grayscale_probability=run.data.grayscale_probability,
            max_pixels=run.data.max_pixels,
        )

    plan = Plan(
        schedule,
        per_epoch,
        opened.accumulation,
        run.runtime.seed,
        evaluate_every=run.eval.every,
        max_bad_fraction=run.data.max_bad_fraction,
        count_bad_every=run.runtime.log_every,
    )
    evaluate = _evaluation(run, engine, source, size, opened.ema) if run.eval.root else None
    if total <= schedule.warmup and not run.optim.max_seconds:
        log.warning(
            "optim.warmup_epochs: the whole run of %d updates is warm-up (%d updates): the rate "
            "never reaches its peak",
            total,
            schedule.warmup,
        )
    try:
        trainer = Trainer(
            engine,
            plan,
            hooks,
            setting,
            checkpoints=opened.checkpoints,
            evaluate=evaluate,
            time_box=time_box,
            layer_rates=by_layer(engine, run.optim.layer_decay),
            ema=opened.ema,
        )
        status = trainer.train(batches)
    except FDError as error:
        error.rank_local = True
        raise
    log.info("%s: %s", status, folder)
    return EXIT_CODES[status]


def _persistence(run: Run, config: dict[str, Any], sizes: tuple[int, ...]) -> int:
    """The size up to which tensors stay whole in an engine that splits; logs their share."""
    zero = config["zero_optimization"]
    automatic, _ = ds.persistence_threshold(sizes)
    threshold = zero.get("stage3_param_persistence_threshold", automatic)
    if zero["stage"] == 3 or run.teacher.placement != "replicated":
        kept = sum(size for size in sizes if size <= threshold)
        log.info(
            "whole on every rank where nets are split: tensors of at most %d elements, %.2f%% of "
            "student and teacher",
            threshold,
            100 * kept / sum(sizes),
        )
    return threshold


def _held_out(run: Run) -> PictureSource:
    try:
        return open_pictures(run.eval.root)
    except DataError as error:
        raise DataError(str(error).replace("data.root", "eval.root")) from None


def _evaluation(
    run: Run, engine: Engine, source: PictureSource, micro_batch_size: int, ema: Ema | None
) -> Evaluate:
    """Measures held-out pictures, and crops of the training pictures that training never sees.

    With the average of the weights where there is one.
    """
    pictures = {"held_out": _held_out(run), "unseen_crops": source}
    sets = distributed.together(
        lambda: [
            Evaluation(
                name,
                of,
                views=run.eval.views,
                image_size=run.data.image_size,
                min_crop_scale=run.data.min_crop_scale,
                micro_batch_size=micro_batch_size,
                seed=run.runtime.seed,
                max_pixels=run.data.max_pixels,
                skip_bad=name == "unseen_crops",
            )
            for name, of in pictures.items()
        ]
    )

    def evaluate(
        update: int, last: bool, between: Callable[[], None]
    ) -> tuple[dict[str, float], dict[str, Any] | None]:
        metrics: dict[str, float] = {}
        with ema.in_place_of_weights() if ema else nullcontext():
            for views in sets:
                metrics |= views.measure(engine, between)
                if last:
                    metrics[f"{views.name}_best_constant"] = views.best_constant(engine, between)
            panel = sets[0].panel(engine) if update == 0 or last else None
        return metrics, panel

    return evaluate


class _Checked(NamedTuple):
    """What the checks before anything heavy have found."""

    source: PictureSource
    precision: Precision
    node_size: int
    parameter_sizes: tuple[int, ...]
    share: int
    fill: Callable[[int], dict[str, Any]]


def _check(run: Run, deepspeed_config: str, launch: Launch) -> _Checked:
    """Finds the user's mistakes; no collective, no network with memory.

    The last of the result fills the JSON for a micro batch size.
    """
    json_config = ds.load(deepspeed_config)
    source = open_pictures(run.data.root)
    if run.eval.root:
        _held_out(run)
    teacher_weights(run)
    student_weights(run)
    precision = precision_of(run)
    node_size = node_size_of(run, launch.local_world_size)
    fixed = run.batch.micro_batch_size
    check_batch_sizes(
        len(source),
        global_batch_size=run.batch.global_batch_size,
        micro_batch_size=1 if fixed == "auto" else fixed,
        world_size=launch.world_size,
    )
    share = run.batch.global_batch_size // launch.world_size
    sizes = parameter_sizes(run)

    def fill(micro_batch_size: int) -> dict[str, Any]:
        numbers = ds.RunNumbers(
            micro_batch_size=micro_batch_size,
            accumulation=share // micro_batch_size,
            world_size=launch.world_size,
            node_size=node_size,
            clip_norm=run.optim.clip_norm,
            bfloat16=precision.bfloat16,
            parameter_sizes=sizes,
        )
        return ds.fill(json_config, numbers)

    fill(1 if fixed == "auto" else fixed)
    return _Checked(source, precision, node_size, sizes, share, fill)


def _probed(
    run: Run, make_task: Callable[[], Task], config: dict[str, Any], folder: Path, share: int
) -> int:
    """The micro batch of the run folder, or of a probe on an engine that is thrown away."""
    world_size = distributed.world_size()
    setting = {
        "world_size": world_size,
        "deepspeed": config["zero_optimization"],
        "bfloat16": config["bf16"]["enabled"],
        "activation_checkpointing": run.student.activation_checkpointing,
        "checkpoint_every": run.student.checkpoint_every,
        "attention_memory": run.student.attention_memory,
        "teacher_placement": run.teacher.placement,
    }
    size = micro_batch.remembered(folder, setting, share)
    if size is not None:
        return size
    on_gpu = distributed.device().type == "cuda"
    memory = micro_batch.GpuMemory() if on_gpu else micro_batch.HostMemory()
    # Every step of the probe is a whole update, moments included.
    whole = {**config, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    engine = build_engine(run, make_task, {**whole, "train_batch_size": world_size})
    engine.task.train()
    size = micro_batch.largest_that_fits(
        share, probe_phases(engine, run.data.image_size, run.runtime.seed), memory
    )
    engine.deepspeed.destroy()
    del engine
    start.forget_engines()
    gc.collect()
    if on_gpu:
        torch.cuda.empty_cache()
    micro_batch.remember(folder, setting, size)
    log.info("micro batch %d per rank, accumulation %d", size, share // size)
    return size


def _share_cores(local_world_size: int) -> None:
    """CPU ranks of one host divide its cores between them, unless the user said otherwise."""
    if distributed.device().type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size))
