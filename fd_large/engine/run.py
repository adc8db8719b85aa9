"""A run from recipe to summary: all checks before anything heavy, then build, resume, train."""

from __future__ import annotations

import gc
import logging
import os
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fd_large import activity, distributed, doors, failures, meeting
from fd_large.checkpoint.lease import Lease
from fd_large.data.blocks import keep_blocks_in
from fd_large.data.loader import Batch
from fd_large.data.sampler import Portion, check_batch_sizes, updates_per_epoch
from fd_large.data.source import ImageSource
from fd_large.engine import micro_batch, node_consistency
from fd_large.engine.best import Best, check_metric
from fd_large.engine.checkpoint_models import sources_of
from fd_large.engine.checkpoints import Checkpoints
from fd_large.engine.count import kernel_calls, step_flops
from fd_large.engine.ema import Ema
from fd_large.engine.ending import end_by, write_end
from fd_large.engine.job import Job, JobOf
from fd_large.engine.loop import Trainer, TrainingPlan
from fd_large.engine.run_page import RunPage
from fd_large.engine.schedule import SCHEDULES, Schedule
from fd_large.engine.task import Task
from fd_large.engine.time_box import TimeBox
from fd_large.engine.zero import config as ds
from fd_large.engine.zero import start
from fd_large.engine.zero.engine import Engine, build_engine
from fd_large.engine.zero.layer_decay import by_layer
from fd_large.engine.zero.optimizer import moments_of
from fd_large.engine.zero.trust_ratio import scale_by_norms
from fd_large.errors import Exit, FDError, check_all
from fd_large.kernels import check, choose
from fd_large.kernels.precision import full_float32
from fd_large.launch import Launch
from fd_large.plan.counts import StepFlops
from fd_large.plan.memory import persistence_threshold
from fd_large.plan.workload import frozen_in_bfloat16
from fd_large.recipes.run import LENGTH, Run, difference
from fd_large.recipes.stored import read_recipe
from fd_large.runtime import logs
from fd_large.runtime.guard import Guard
from fd_large.runtime.hooks import DONE, FAILED, PREEMPTED, Hook, Setting
from fd_large.runtime.meter import Meter
from fd_large.runtime.preemption import Preemption
from fd_large.runtime.profiler import Profiler
from fd_large.runtime.progress import Progress
from fd_large.runtime.run_folder import (
    open_folder,
    record_code,
    recorded_code,
    rows_before,
    source_commit,
    status_of,
    write_environment,
    write_status,
)
from fd_large.runtime.save_interval import SaveInterval
from fd_large.runtime.trackers import trackers_of
from fd_large.runtime.watchdog import Watchdog
from fd_large.weights.source import Sources

log = logging.getLogger(__name__)

EXIT_CODES = {DONE: Exit.DONE, PREEMPTED: Exit.AGAIN}
"""Exit codes by status. After all others somebody has to look: a hook ended the run, or its last
state could not be saved."""


def train(
    run: Run,
    job_of: JobOf,
    *,
    deepspeed_config: str,
    lease: Lease,
    fresh: bool = False,
    profile: int = 0,
    hooks: Sequence[Hook] = (),
) -> int:
    """Trains a recipe to its end, with everything that watches a run; returns the exit code.

    Args:
        run: The recipe.
        job_of: Makes the job of the recipe's task.
        deepspeed_config: Path of the DeepSpeed JSON.
        lease: This start's right to write the run's folder.
        fresh: Start over instead of resuming; the old run's files are moved aside.
        profile: Steps to trace with torch's profiler, after the first three; 0 turns it off.
        hooks: Hooks besides those that the recipe asks for.

    Raises: FDError: for the user's mistakes, before training where that is possible.
    """
    # Files that are as this run's own folder recorded them; the command line allows all others.
    # What the folder alone names stays refused, as the folder may have come from elsewhere.
    recorded, named = recorded_code(Path(run.run_dir())), run.code()
    doors.allow_unchanged({name: recorded[name] for name in named.keys() & recorded.keys()})
    watching: list[Hook] = []

    def lost(reason: str) -> None:
        write_end(lease, FAILED, reason, first=False)

    failures.last_words.append(lost)
    with activity.work("meeting the other ranks"):
        launch = distributed.start()
    # From the moment on that the ranks have met.
    preemption = preemption_of(run, lease, launch.launcher)
    watchdog = watchdog_of(run, lease)
    if watchdog:
        watchdog.start()
    try:
        opened = open_run(run, job_of, deepspeed_config=deepspeed_config, lease=lease, fresh=fresh)
        # The watchdog is the last, so that it watches what the others do at the end as well.
        more = [*hooks, *(hook for hook in (preemption, watchdog) if hook)]
        return _train(opened, lease, profile, more, watching)
    except BaseException as error:
        end_by(error, lease, watching)
        raise
    finally:
        failures.last_words.remove(lost)
        if watchdog:
            watchdog.stop()
        if preemption:
            preemption.close()


def _train(
    opened: Opened,
    lease: Lease,
    profile: int,
    more_hooks: Sequence[Hook],
    watching: list[Hook],
) -> int:
    """Trains an opened run; fills `watching` with the hooks that have begun."""
    run, job, folder, engine = opened.run, opened.job, opened.folder, opened.engine
    samples, checkpoints, size = opened.samples, opened.checkpoints, opened.micro_batch_size
    launch = opened.launch
    checkpoints.sweep()
    with activity.work("reading the last checkpoint"):
        first = checkpoints.resume()
    record_code(folder, run.code(), first)
    per_epoch = updates_per_epoch(len(samples), run.batch.global_batch_size)
    total = run.optim.max_steps or run.optim.epochs * per_epoch
    time_box = None
    if run.optim.max_seconds:
        time_box = checkpoints.time_box = TimeBox(
            run.optim.max_seconds, folder, total, first=first, stored=checkpoints.stored_time_box
        )
        total = time_box.total
    best = _best_of(job, folder, first)
    done = distributed.broadcast_object(status_of(folder) == DONE)
    if done and (first >= total or (best is not None and best.exhausted)):
        why = f" ({best.reason()})" if first < total and best else ""
        log.info("%s: finished after %d steps%s; nothing to do", folder, first, why)
        return 0
    if first:
        log.info("resumed after step %d of %d", first, total)
    checkpoints.log_disk_use(total)

    peak, warmup_start, minimum = run.optim.rates(run.batch.global_batch_size)
    warmup = int(run.optim.warmup_epochs * per_epoch)
    if total <= warmup and not run.optim.max_seconds:
        log.warning(
            "optim.warmup_epochs: the whole run of %d steps is warm-up (%d steps): the learning "
            "rate never reaches its peak",
            total,
            warmup,
        )
    drops = {"drops": run.optim.drops} if run.optim.drops else {}
    make = SCHEDULES[run.optim.schedule]
    schedule = make(peak, warmup_start, minimum, total, warmup, **drops)
    if first:
        _log_other_length(checkpoints.stored_recipe, run, folder, schedule, first)
    plan = TrainingPlan(
        schedule,
        per_epoch,
        opened.accumulation,
        run.runtime.seed,
        max_bad_fraction=run.data.max_bad_fraction,
        count_bad_every=run.runtime.log_every,
    )
    setting = Setting(
        folder=folder,
        facts=job.summary(),
        first_update=first,
        total_updates=total,
        global_batch_size=run.batch.global_batch_size,
        micro_batch_size=size,
        accumulation=opened.accumulation,
        world_size=launch.world_size,
        log_every=run.runtime.log_every,
        max_seconds=run.optim.max_seconds,
        flops=_step_flops(job, size),
        checkpoint_bytes=checkpoints.bytes,
        start=lease.start,
        owned=lease.owned,
        metrics=job.metrics,
        evaluated=job.evaluated,
        name_of=samples.__getitem__,
    )

    def batches(epoch: int, first_update: int) -> Iterator[Batch]:
        portion = Portion(epoch, first_update, size, launch.rank, launch.world_size)
        return job.batches(samples, portion)

    evaluations = job.evaluations(engine, samples, size)
    layer_rates = by_layer(engine, run.optim.layer_decay)
    scale_by_norms(engine)
    try:
        trainer = Trainer(
            engine,
            plan,
            hooks_of(job, profile, more_hooks),
            setting,
            checkpoints=checkpoints,
            evaluations=evaluations,
            time_box=time_box,
            layer_rates=layer_rates,
            ema=opened.ema,
            best=best,
            begun=watching,
        )
        status = trainer.train(batches)
    except FDError as error:
        error.rank_local = not error.agreed
        raise
    if best is not None and distributed.is_main():
        why = {"reason": best.reason()} if trainer.stopped_early else {}
        write_status(folder, status, best=best.to_dict(), **why)
    log.info("%s: %s", status, folder)
    return EXIT_CODES.get(status, Exit.LOOK)


def _best_of(job: Job, folder: Path, finished: int) -> Best | None:
    """Returns what compares the run's evaluations; None where the recipe names no metric."""
    wanted = job.run.eval
    if not wanted.best_metric:
        return None
    metric = next(n for n in job.metrics if n.replace("/", "_") == wanted.best_metric)
    return Best.of_folder(
        folder,
        finished,
        metric=wanted.best_metric,
        lower_is_better=metric.partition("/")[2] in job.lower_is_better,
        patience=wanted.patience,
    )


def _log_other_length(
    stored: dict[str, Any], run: Run, folder: Path, schedule: Schedule, finished: int
) -> None:
    """Says what changes for a run whose length is not the one that its checkpoint was made for."""
    with suppress(FDError):
        changed = {
            name: values
            for name, values in difference(Run.from_dict(stored), run).items()
            if name in LENGTH
        }
        if not changed or not distributed.is_main():
            return
        rows = rows_before(folder / "metrics.jsonl", finished)
        last = f" after {rows[-1]['learning_rate']:.3g} at the last one" if rows else ""
        log.warning(
            "%s: ANOTHER SCHEDULE from here on: the run goes on after step %d to step %d, and its "
            "schedule ends there. The learning rate of the next step is %.3g%s. The result is not "
            "that of a run that had this length from its start.",
            ", ".join(f"{name} {was!r} -> {now!r}" for name, (was, now) in changed.items()),
            finished,
            schedule.total,
            schedule.at_step(finished),
            last,
        )


def _step_flops(job: Job, micro_batch_size: int) -> StepFlops | None:
    """Counts on rank 0, which alone reports them."""
    if not distributed.is_main():
        return None
    checkpointing = job.run.student.activation_checkpointing != "off"
    return step_flops(job, micro_batch_size, checkpointing=checkpointing)


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
    accumulation: int
    ema: Ema | None


def open_run(
    run: Run,
    job_of: JobOf,
    *,
    deepspeed_config: str,
    lease: Lease | None = None,
    fresh: bool = False,
) -> Opened:
    """Checks everything, then builds the task and its engine on all ranks.

    Args:
        run: The recipe.
        job_of: Makes the job of the recipe's task.
        deepspeed_config: Path of the DeepSpeed JSON.
        lease: This start's right to write the run's folder; None: nothing is written to it.
        fresh: Start over instead of resuming; the old run's files are moved aside.

    Raises: FDError: for the user's mistakes, before anything heavy where that is possible.
    """
    launch = distributed.start()
    _share_cores(launch.local_world_size)
    settled_before = None if fresh else _settled_statistics(run.run_dir())
    weights = sources_of(job_of, settled=distributed.broadcast_object(settled_before))
    # What a weights file decides (model, window, statistics) is part of the recipe from here on.
    with activity.work("reading images and weights"):
        settled = meeting.meet(lambda: _settle(job_of(run), weights, deepspeed_config))
    # If a source is still being trained, ranks may have found different checkpoints.
    run = distributed.broadcast_object(settled)
    job = job_of(run)
    job.weights = weights
    keep_blocks_in(run.data.cache, run.data.cache_gb)
    with activity.work("checking the recipe"):
        json_config, numbers, samples = meeting.meet(lambda: _check(job, deepspeed_config, launch))
    code = run.code()
    node_consistency.check(samples, job.sources(), weights, code)
    with activity.work("copying images"):
        samples = job.stage(samples)

    folder = Path(run.run_dir())
    if lease:
        start_anew = lease.start_anew if fresh else None
        open_folder(folder, run.to_dict(), run.changes_since, start_anew=start_anew)
        lease.entered = True
        logs.set_up(folder)
    start.start()
    full_float32(distributed.device())
    config = ds.fill(json_config, numbers)
    log.debug(
        "gradients: summed over %d ranks in %s",
        launch.world_size,
        config["communication_data_type"],
    )
    _check_kernels(job, bfloat16=numbers.bfloat16)
    sizes = numbers.parameter_sizes
    threshold = _persistence(config, sizes, splits_models=job.splits_models())
    with activity.work("building the models"), micro_batch.building_in_memory(job.memory_remedy):
        job.build(
            bfloat16=numbers.bfloat16,
            node_size=numbers.node_size,
            persistence_threshold=threshold,
        )
    if run.batch.micro_batch_size == "auto":
        share = numbers.micro_batch_size * numbers.accumulation
        numbers = numbers.with_micro_batch(_probed(job, config, folder, share, keep=bool(lease)))
        config = ds.fill(json_config, numbers)
    if lease:
        write_environment(folder, config, launch.launcher, job.metrics)

    with activity.work("building the engine"), micro_batch.building_in_memory(job.memory_remedy):
        engine = engine_of(
            run,
            job.make_task,
            config,
            initial=job.initial_weights(),
            heads=job.initial_heads(),
        )
    weights.forget()
    # Before any resume, which restores the average too.
    ema = Ema(engine, run.optim.ema_decay) if run.optim.ema_decay else None
    facts = {
        **job.facts(),
        "pictures": samples.fingerprint,
        "commit": distributed.broadcast_object(source_commit() if distributed.is_main() else None),
        "recipe": run.to_dict(),
        **({"code": code} if code else {}),
    }
    checkpoints = Checkpoints(
        folder,
        engine,
        runtime=run.runtime,
        global_batch_size=run.batch.global_batch_size,
        facts=facts,
        check_stored=job.check_stored,
        lease=lease,
    )
    return Opened(
        run,
        folder,
        launch,
        job,
        samples,
        engine,
        checkpoints,
        numbers.micro_batch_size,
        numbers.accumulation,
        ema,
    )


def open_stored(
    folder: str, job_of: JobOf, *, deepspeed_config: str, where: str, lease: Lease | None = None
) -> Opened:
    """Opens the run of a folder again, wherever the folder stands now.

    Args:
        folder: Folder of the run.
        job_of, deepspeed_config, lease: See `open_run`.
        where: The command, for messages.
    """
    run = read_recipe(folder, where=where)
    run = replace(run, runtime=replace(run.runtime, run_dir=folder))
    return open_run(run, job_of, deepspeed_config=deepspeed_config, lease=lease)


def _settled_statistics(folder: str) -> dict[str, tuple[float, ...]]:
    """Returns {source: image statistics} of the models that the folder's run uses, if it has one.

    The source of the student's initial weights is among them. Earlier versions settled what is
    asked for now; their runs go on as they began.
    """
    with suppress(FDError, OSError, AttributeError):  # `open_folder` says what is wrong.
        stored = read_recipe(folder, where="--runtime.run_dir")
        models = stored.frozen_models.values()
        return {stored.student.init: (), **{one.source: one.statistics for one in models}}
    return {}


def _settle(job: Job, weights: Sources, deepspeed_config: str) -> Run:
    """Returns the recipe with what its weights decide.

    Raises: FDError: telling the mistakes in what does not depend on weights, too.
    """
    try:
        return job.settle(weights)
    except FDError:
        # Once more, beside what it hides.
        check_all(lambda: job.settle(weights), lambda: ds.load(deepspeed_config), job.open_samples)
        raise


def _check(
    job: Job, deepspeed_config: str, launch: Launch
) -> tuple[dict[str, Any], ds.RunNumbers, ImageSource]:
    """Finds the user's mistakes; without a collective, and without a model in memory.

    Returns: the DeepSpeed JSON, the numbers to fill it with (micro batch 1 where it is "auto"), and
        the training samples.
    """
    run = job.run
    json_config, samples, *_ = check_all(
        lambda: ds.load(deepspeed_config),
        job.open_samples,
        job.check,
        lambda: run.eval.best_metric and check_metric(run.eval.best_metric, job.metrics),
        lambda: moments_of(run.optim, distributed.device().type),
        lambda: trackers_of(run.runtime.trackers),
    )
    fixed = run.batch.micro_batch_size
    size = 1 if fixed == "auto" else fixed
    node_size = ds.ranks_of_a_node(run.engine.node_size, launch.local_world_size)
    check_batch_sizes(
        len(samples),
        global_batch_size=run.batch.global_batch_size,
        micro_batch_size=size,
        world_size=launch.world_size,
    )
    numbers = ds.RunNumbers(
        micro_batch_size=size,
        accumulation=run.batch.global_batch_size // launch.world_size // size,
        world_size=launch.world_size,
        node_size=node_size,
        clip_norm=run.optim.clip_norm,
        bfloat16=ds.computes_in_bfloat16(run.engine.precision),
        parameter_sizes=job.parameter_sizes(),
    )
    ds.fill(json_config, numbers)
    for where, source in job.sources().items():
        job.weights.fetch(source, where=f"--{where}")
    return json_config, numbers, samples


def _check_kernels(job: Job, *, bfloat16: bool) -> None:
    """Holds the kernels that will run against their references, and gives up what is off."""
    device = distributed.device()
    if not choose.may_run_kernels(device.type):
        return
    calls: list[check.Call] = []
    if distributed.is_main():
        teacher = job.run.teacher.dtype if job.run.frozen_models else "auto"
        # Interpreted on a CPU, they are those of the newest card.
        capability = choose.CAPABILITIES[-1]
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability()
        try:
            calls = kernel_calls(
                job,
                capability,
                bfloat16=bfloat16,
                frozen_bfloat16=frozen_in_bfloat16(teacher, bfloat16),
            )
        except FDError as error:
            log.warning("kernels are not held against their references: %s", error)
    check.check(distributed.broadcast_object(calls), device)


def _persistence(config: dict[str, Any], sizes: tuple[int, ...], *, splits_models: bool) -> int:
    """Returns the size up to which tensors stay whole in an engine that splits models."""
    zero = config["zero_optimization"]
    threshold = zero.get("stage3_param_persistence_threshold", persistence_threshold(sizes))
    if zero["stage"] == 3 or splits_models:
        kept = sum(size for size in sizes if size <= threshold)
        log.debug(
            "whole on every rank where models are split: tensors of at most %d elements, %.2f%% of "
            "all",
            threshold,
            100 * kept / sum(sizes),
        )
    return threshold


def _probed(job: Job, config: dict[str, Any], folder: Path, share: int, *, keep: bool) -> int:
    """Returns the run folder's micro batch, or that of a probe on an engine that is thrown away."""
    run, world_size = job.run, distributed.world_size()
    setting = {
        "world_size": world_size,
        "deepspeed": config["zero_optimization"],
        "bfloat16": config["bf16"]["enabled"],
        "activation_checkpointing": run.student.activation_checkpointing,
        "checkpoint_every": run.student.checkpoint_every,
        "attention_memory": run.student.attention_memory,
        "compile": run.engine.compile,
        "ema": bool(run.optim.ema_decay),
        "kernels": choose.wished(),
        **micro_batch.memory_setting(),
        **job.memory_facts(),
    }
    size = micro_batch.remembered(folder, setting, share)
    if size is not None:
        return size
    # Every step of the probe is a whole step, moments included.
    whole = {**config, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1}
    engine = engine_of(run, job.make_task, {**whole, "train_batch_size": world_size})
    average = Ema(engine, run.optim.ema_decay) if run.optim.ema_decay else None
    with activity.work("trying micro batches"):
        size = micro_batch.probe(engine, job.probe_batch, share=share, seed=run.runtime.seed)
    engine.deepspeed.destroy()
    del engine, average
    start.forget_engines()
    gc.collect()
    if distributed.device().type == "cuda":
        torch.cuda.empty_cache()
    if keep:
        micro_batch.remember(folder, setting, size)
    log.info("micro batch %d per rank, accumulation %d", size, share // size)
    return size


def engine_of(
    run: Run,
    make: Callable[[], Task],
    config: dict[str, Any],
    *,
    initial: Iterable[tuple[str, Tensor]] | None = None,
    heads: Mapping[str, Iterable[tuple[str, Tensor]]] | None = None,
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
        whole_first=run.student_architecture().whole_first,
        initial=initial,
        heads=heads,
    )


def hooks_of(job: Job, profile: int = 0, more: Sequence[Hook] = ()) -> list[Hook]:
    """Returns what watches a run, in the order in which it is asked.

    Args:
        job: The job, after its `build`.
        profile: Steps to trace; 0 turns it off.
        more: Hooks besides those of the recipe and the task.
    """
    run = job.run
    hooks: list[Hook] = [
        Meter(trackers=[Progress(), *trackers_of(run.runtime.trackers), RunPage()]),
    ]
    if run.guard.enabled:
        hooks.append(Guard(run.guard))
    if run.runtime.save_minutes:
        hooks.append(SaveInterval(run.runtime.save_minutes))
    if profile:
        hooks.append(Profiler(profile))
    return [*hooks, *job.hooks(), *more]


def preemption_of(run: Run, lease: Lease, launcher: str) -> Preemption | None:
    """Returns what catches signals from now on; None where the recipe turns it off.

    Only the main thread of a process can, which a guest may not be in.
    """
    is_main_thread = threading.current_thread() is threading.main_thread()
    if not run.runtime.preemption or not is_main_thread:
        return None
    return Preemption(
        run.runtime.notice_seconds,
        launcher=launcher,
        leaving=lease.will_leave,
        write_status=lambda status: write_end(lease, status, "a second Ctrl-C", first=True),
        ends_process=not distributed.is_guest(),
    )


def watchdog_of(run: Run, lease: Lease) -> Watchdog | None:
    """Returns the recipe's watchdog; None where it is turned off, or must not end the process."""
    if not run.runtime.watchdog_seconds or distributed.is_guest():
        return None
    return Watchdog(
        run.runtime.watchdog_seconds,
        lease.folder,
        lambda: lease.entered and lease.owned(),
        start=lease.start,
    )


def _share_cores(local_world_size: int) -> None:
    """Divides a host's cores between its CPU ranks, unless OMP_NUM_THREADS is set."""
    if distributed.device().type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_world_size))
