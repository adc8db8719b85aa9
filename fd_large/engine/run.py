"""A run from recipe to summary: every check before anything heavy, then build, resume, train."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fd_large import distributed
from fd_large.data.loader import Batch
from fd_large.data.sampler import Portion, check_batch_sizes, updates_per_epoch
from fd_large.data.source import ImageSource
from fd_large.engine import micro_batch, node_consistency
from fd_large.engine.checkpoint_models import serve_runs
from fd_large.engine.checkpoints import Checkpoints
from fd_large.engine.ema import Ema
from fd_large.engine.evaluation import steps_between
from fd_large.engine.forward_backward import probe_phases
from fd_large.engine.job import Job
from fd_large.engine.loop import Plan, Trainer
from fd_large.engine.schedule import CosineSchedule
from fd_large.engine.task import Task
from fd_large.engine.time_box import TimeBox
from fd_large.engine.zero import config as ds
from fd_large.engine.zero import start
from fd_large.engine.zero.engine import Engine, build_engine
from fd_large.engine.zero.layer_decay import by_layer
from fd_large.errors import FDError
from fd_large.launch import Launch
from fd_large.plan.memory import persistence_threshold
from fd_large.recipes.run import Run
from fd_large.runtime import logs
from fd_large.runtime.feature_panel import FeaturePanel
from fd_large.runtime.guard import Guard
from fd_large.runtime.hooks import DONE, NOT_SAVED, PREEMPTED, Hook, Setting
from fd_large.runtime.meter import Meter
from fd_large.runtime.preemption import Preemption
from fd_large.runtime.profiler import Profiler
from fd_large.runtime.progress import Progress
from fd_large.runtime.run_folder import open_folder, source_commit, status_of, write_environment
from fd_large.runtime.save_interval import SaveInterval
from fd_large.runtime.tensorboard import TensorBoard
from fd_large.runtime.watchdog import Watchdog
from fd_large.weights.settle import settle

log = logging.getLogger(__name__)

EXIT_CODES = {DONE: 0, PREEMPTED: 75, NOT_SAVED: 75}
"""75: the last checkpoint stands, the same command goes on from it."""
SOMEBODY_HAS_TO_LOOK = 3
"""The exit code of a run that a hook ended, under whatever status."""


class Opened(NamedTuple):
    """A run with everything built and nothing trained or restored yet."""

    run: Run
    folder: Path
    launch: Launch
    job: Job
    samples: ImageSource
    engine: Engine
    checkpoints: Checkpoints
    micro_batch_size: int
    ema: Ema | None

    @property
    def accumulation(self) -> int:
        """Micro batches per step."""
        share = self.run.batch.global_batch_size // self.launch.world_size
        return share // self.micro_batch_size


def open_run(
    run: Run, job_of: Callable[[Run], Job], *, deepspeed_config: str, fresh: bool = False
) -> Opened:
    """Checks everything, then builds the task and its engine on all ranks.

    Args:
        run: The resolved recipe.
        job_of: Makes its task's job.
        deepspeed_config: Path of the DeepSpeed JSON.
        fresh: Start over instead of resuming; the old run's files are moved aside.

    Raises: FDError: for the user's mistakes, before anything heavy where that is possible.
    """
    launch = distributed.start()
    _share_cores(launch.local_world_size)
    serve_runs(job_of)
    # What a weights file decides (model, window, statistics) is part of the recipe from here on.
    settled = distributed.together(lambda: settle(run))
    # A source that still trains may show ranks different checkpoints.
    run = distributed.broadcast_object(settled)
    job = job_of(run)
    checked = distributed.together(lambda: _check(job, deepspeed_config, launch))
    samples, bfloat16, node_size, sizes, share, fill = checked
    node_consistency.check(samples, job.sources())
    samples = job.stage(samples)
    fixed = run.batch.micro_batch_size
    config = fill(1 if fixed == "auto" else fixed)

    folder = open_folder(run, fresh=fresh)
    logs.set_up(folder)
    start.start()
    threshold = _persistence(config, sizes, splits_models=job.splits_models())
    with micro_batch.building_in_memory(job.memory_remedy):
        job.build(bfloat16=bfloat16, node_size=node_size, persistence_threshold=threshold)
    size = fixed
    if size == "auto":
        size = _probed(job, config, folder, share)
    config = fill(size)
    write_environment(folder, config, launch.launcher, job.metrics)

    with micro_batch.building_in_memory(job.memory_remedy):
        engine = engine_of(run, job.make_task, config, initial=job.initial_weights())
    # Before any resume, which restores the average too.
    ema = Ema(engine, run.optim.ema_decay) if run.optim.ema_decay else None
    facts = {
        **job.facts(),
        "pictures": samples.fingerprint,
        "commit": distributed.broadcast_object(source_commit()),
        "recipe": run.to_dict(),
    }
    checkpoints = Checkpoints(
        folder,
        engine,
        runtime=run.runtime,
        global_batch_size=run.batch.global_batch_size,
        facts=facts,
        check_stored=job.check_stored,
    )
    return Opened(run, folder, launch, job, samples, engine, checkpoints, size, ema)


def train(
    run: Run,
    job_of: Callable[[Run], Job],
    *,
    deepspeed_config: str,
    fresh: bool = False,
    profile: int = 0,
    hooks: Sequence[Hook] = (),
) -> int:
    """Trains a recipe to its end, with everything that watches a run; returns the exit code.

    Args:
        run: The resolved recipe.
        job_of: Makes its task's job.
        deepspeed_config: Path of the DeepSpeed JSON.
        fresh: Start over instead of resuming; the old run's files are moved aside.
        profile: Steps to trace with torch's profiler, after the first three; 0 turns it off.
        hooks: Hooks besides those that the recipe asks for.

    Raises: FDError: for the user's mistakes, before training where that is possible.
    """
    opened = open_run(run, job_of, deepspeed_config=deepspeed_config, fresh=fresh)
    run, job = opened.run, opened.job
    folder, engine, samples = opened.folder, opened.engine, opened.samples
    per_epoch = updates_per_epoch(len(samples), run.batch.global_batch_size)
    total = run.optim.max_steps or run.optim.epochs * per_epoch
    opened.checkpoints.sweep()
    first = opened.checkpoints.resume()
    time_box = None
    if run.optim.max_seconds:
        time_box = TimeBox(run.optim.max_seconds, folder, total, first=first)
        if (decided := time_box.decided()) is not None:
            total, time_box = decided, None
    size, launch = opened.micro_batch_size, opened.launch
    on_gpu = distributed.device().type == "cuda"
    memory = run.student.attention_memory
    teacher = {"model": run.teacher.model, "source": run.teacher.source}
    setting = Setting(
        folder=folder,
        facts={
            "recipe": run.name,
            "student": run.student.model,
            "teacher": teacher if run.has_teacher else None,
        },
        first_update=first,
        total_updates=total,
        global_batch_size=run.batch.global_batch_size,
        micro_batch_size=size,
        accumulation=opened.accumulation,
        world_size=launch.world_size,
        log_every=run.runtime.log_every,
        flops=job.step_flops(
            size, attention_recomputed=on_gpu if memory == "auto" else memory != "keep"
        ),
        checkpoint_bytes=opened.checkpoints.bytes,
        metrics=job.metrics,
        name_of=samples.__getitem__,
    )
    if first >= total and distributed.broadcast_object(status_of(folder) == DONE):
        log.info("%s: finished after %d steps; nothing to do", folder, first)
        return 0
    if first:
        log.info("resumed after step %d of %d", first, total)
    opened.checkpoints.say_what_disk_it_takes(total)
    peak, warmup_start, minimum = run.optim.rates(run.batch.global_batch_size)
    schedule = CosineSchedule(
        peak, warmup_start, minimum, total, int(run.optim.warmup_epochs * per_epoch)
    )

    def batches(epoch: int, first_update: int) -> Iterator[Batch]:
        portion = Portion(epoch, first_update, size, launch.rank, launch.world_size)
        return job.batches(samples, portion)

    plan = Plan(
        schedule,
        per_epoch,
        opened.accumulation,
        run.runtime.seed,
        max_bad_fraction=run.data.max_bad_fraction,
        count_bad_every=run.runtime.log_every,
    )
    evaluations = job.evaluations(engine, samples, size)
    if time_box is not None:
        time_box.evaluate_every = steps_between(evaluations)
    if total <= schedule.warmup and not run.optim.max_seconds:
        log.warning(
            "optim.warmup_epochs: the whole run of %d steps is warm-up (%d steps): the rate "
            "never reaches its peak",
            total,
            schedule.warmup,
        )
    try:
        trainer = Trainer(
            engine,
            plan,
            hooks_of(job, profile, hooks),
            setting,
            checkpoints=opened.checkpoints,
            evaluations=evaluations,
            time_box=time_box,
            layer_rates=by_layer(engine, run.optim.layer_decay),
            ema=opened.ema,
        )
        status = trainer.train(batches)
    except FDError as error:
        error.rank_local = not error.agreed
        raise
    log.info("%s: %s", status, folder)
    return EXIT_CODES.get(status, SOMEBODY_HAS_TO_LOOK)


def hooks_of(job: Job, profile: int = 0, more: Sequence[Hook] = ()) -> list[Hook]:
    """Returns what watches a run, in the order in which it is asked.

    Args:
        job: After its `build`.
        profile: Steps to trace; 0: none.
        more: Hooks besides those of the recipe and the task.
    """
    run = job.run
    hooks: list[Hook] = [Meter(trackers=[Progress(), TensorBoard()]), FeaturePanel()]
    if run.guard.enabled:
        hooks.append(Guard(run.guard))
    if run.runtime.save_minutes:
        hooks.append(SaveInterval(run.runtime.save_minutes))
    if run.runtime.preemption:
        hooks.append(Preemption(run.runtime.notice_seconds))
    if profile:
        hooks.append(Profiler(profile))
    hooks += [*job.hooks(), *more]
    if run.runtime.watchdog_seconds:
        # The last one: what the others do at the end is watched as well.
        hooks.append(Watchdog(run.runtime.watchdog_seconds))
    return hooks


def engine_of(
    run: Run,
    make: Callable[[], Task],
    config: dict[str, Any],
    *,
    initial: Iterable[tuple[str, Tensor]] | None = None,
) -> Engine:
    """Builds a task in its engine as the recipe says; see `build_engine`."""
    return build_engine(
        make,
        config,
        optim=run.optim,
        seed=run.runtime.seed,
        compile_blocks=run.engine.compile == "blocks",
        activation_checkpointing=run.student.activation_checkpointing,
        checkpoint_every=run.student.checkpoint_every,
        initial=initial,
    )


def _persistence(config: dict[str, Any], sizes: tuple[int, ...], *, splits_models: bool) -> int:
    """The size up to which tensors stay whole in an engine that splits; logs their share."""
    zero = config["zero_optimization"]
    automatic = persistence_threshold(sizes)
    threshold = zero.get("stage3_param_persistence_threshold", automatic)
    if zero["stage"] == 3 or splits_models:
        kept = sum(size for size in sizes if size <= threshold)
        log.info(
            "whole on every rank where models are split: tensors of at most %d elements, %.2f%% of "
            "all",
            threshold,
            100 * kept / sum(sizes),
        )
    return threshold


class _Checked(NamedTuple):
    """What the checks before anything heavy have found."""

    samples: ImageSource
    bfloat16: bool
    node_size: int
    parameter_sizes: tuple[int, ...]
    share: int
    fill: Callable[[int], dict[str, Any]]


def _check(job: Job, deepspeed_config: str, launch: Launch) -> _Checked:
    """Finds the user's mistakes; no collective, no network with memory.

    The last of the result fills the JSON for a micro batch size.
    """
    run = job.run
    json_config = ds.load(deepspeed_config)
    samples = job.open_samples()
    job.check()
    bfloat16 = ds.computes_in_bfloat16(run.engine.precision)
    node_size = ds.ranks_of_a_node(run.engine.node_size, launch.local_world_size)
    fixed = run.batch.micro_batch_size
    check_batch_sizes(
        len(samples),
        global_batch_size=run.batch.global_batch_size,
        micro_batch_size=1 if fixed == "auto" else fixed,
        world_size=launch.world_size,
    )
    share = run.batch.global_batch_size // launch.world_size
    sizes = job.parameter_sizes()

    def fill(micro_batch_size: int) -> dict[str, Any]:
        numbers = ds.RunNumbers(
            micro_batch_size=micro_batch_size,
            accumulation=share // micro_batch_size,
            world_size=launch.world_size,
            node_size=node_size,
            clip_norm=run.optim.clip_norm,
            bfloat16=bfloat16,
            parameter_sizes=sizes,
        )
        return ds.fill(json_config, numbers)

    fill(1 if fixed == "auto" else fixed)
    return _Checked(samples, bfloat16, node_size, sizes, share, fill)


def _probed(job: Job, config: dict[str, Any], folder: Path, share: int) -> int:
    """The micro batch of the run folder, or of a probe on an engine that is thrown away."""
    run, world_size = job.run, distributed.world_size()
    setting = {
        "world_size": world_size,
        "deepspeed": config["zero_optimization"],
        "bfloat16": config["bf16"]["enabled"],
        "activation_checkpointing": run.student.activation_checkpointing,
        "checkpoint_every": run.student.checkpoint_every,
        "attention_memory": run.student.attention_memory,
        **job.memory_facts(),
    }
    size = micro_batch.remembered(folder, setting, share)
    if size is not None:
        return size
    on_gpu = distributed.device().type == "cuda"
    memory = micro_batch.GpuMemory() if on_gpu else micro_batch.HostMemory()
    # Every step of the probe is a whole step, moments included.
    whole = {**config, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    engine = engine_of(run, job.make_task, {**whole, "train_batch_size": world_size})
    engine.task.train()
    size = micro_batch.largest_that_fits(
        share, probe_phases(engine, job.probe_batch, run.runtime.seed), memory
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
