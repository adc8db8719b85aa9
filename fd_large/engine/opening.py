"""Opening a run: all checks before anything heavy, then its models, its engine, its checkpoints."""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fd_large.checkpoint.lease import Lease
from fd_large.data.blocks import keep_blocks_in
from fd_large.data.sampler import check_batch_sizes
from fd_large.data.source import ImageSource
from fd_large.engine import memory, node_consistency
from fd_large.engine.checkpoint_models import sources_of
from fd_large.engine.checkpoints import Checkpoints
from fd_large.engine.counting import micro_batch
from fd_large.engine.counting.count import kernel_calls
from fd_large.engine.ema import Ema
from fd_large.engine.job import Job, JobOf
from fd_large.engine.task import Task
from fd_large.engine.zero import config as ds
from fd_large.engine.zero import start
from fd_large.engine.zero.engine import Engine, build_engine
from fd_large.engine.zero.optimizer import moments_of
from fd_large.errors import FDError, check_all, masked
from fd_large.kernels import check, choose
from fd_large.kernels.precision import full_float32
from fd_large.plan.memory import Placement, held, persistence_threshold
from fd_large.plan.workload import frozen_in_bfloat16
from fd_large.ranks import activity, distributed, meeting
from fd_large.ranks.launch import Launch
from fd_large.recipes.run import Run
from fd_large.recipes.stored import read_recipe
from fd_large.recipes.task_kind import check_metric
from fd_large.runtime import disks, logs
from fd_large.runtime.run_folder import (
    open_folder,
    source_commit,
    versions,
    write_environment,
)
from fd_large.runtime.trackers import trackers_of
from fd_large.weights.resolve import Sources

log = logging.getLogger(__name__)


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
    leases = [lease] if lease else []
    (opened,) = open_together([run], job_of, deepspeed_config, leases, fresh=fresh)
    return opened


def open_together(
    runs: Sequence[Run],
    job_of: JobOf,
    deepspeed_config: str,
    leases: Sequence[Lease],
    *,
    whole: Run | None = None,
    fresh: bool = False,
) -> list[Opened]:
    """Opens runs that differ in their students alone; they share images and frozen models.

    Args:
        runs: The recipes.
        job_of, deepspeed_config, fresh: See `open_run`.
        leases: This start's right to write each run's folder; none: nothing is written.
        whole: The recipe of all, in whose folder theirs stand; None: there is none.

    Raises: FDError: as `open_run`.
    """
    launch = distributed.start()
    _share_cores(launch.local_world_size)
    settled_before: dict[str, tuple[float, ...]] = {}
    for run in () if fresh else runs:
        settled_before |= _settled_statistics(run.run_dir())
    weights = sources_of(job_of, settled=distributed.broadcast_object(settled_before))
    # What a weights file decides (model, window, statistics) is part of the recipe from here on.
    with activity.work("reading images and weights"):
        settled = meeting.meet(
            lambda: [_settle(job_of(run), weights, deepspeed_config) for run in runs]
        )
    # If a source is still being trained, ranks may have found different checkpoints.
    runs = distributed.broadcast_object(settled)
    jobs = [job_of(run) for run in runs]
    for job in jobs:
        job.weights = weights
    first = jobs[0]
    keep_blocks_in(first.run.data.cache, first.run.data.cache_gb)
    with activity.work("checking the recipe"):
        json_config, counted, samples = meeting.meet(lambda: _check(jobs, deepspeed_config, launch))
    for job in jobs:
        node_consistency.check(samples, job.sources(), weights, job.run.code())
    with activity.work("copying images"):
        samples = first.stage(samples)

    folders = [Path(run.run_dir()) for run in runs]
    start_anew = leases[0].start_anew if leases and fresh else None
    if whole:
        open_folder(leases[0].root, whole.to_dict(), whole.changes_since, start_anew=start_anew)
        start_anew = None
    for run, lease in zip(runs, leases, strict=bool(leases)):
        open_folder(lease.folder, run.to_dict(), run.changes_since, start_anew=start_anew)
        lease.entered, start_anew = True, None
    if leases:
        logs.set_up(leases[0].root)
    with activity.work("starting DeepSpeed"):
        start.start()
    full_float32(distributed.device())
    configs = [ds.fill(json_config, numbers) for numbers in counted]
    log.debug(
        "gradients: summed over %d ranks in %s",
        launch.world_size,
        configs[0]["communication_data_type"],
    )
    for job, numbers in zip(jobs, counted, strict=True):
        check_kernels(job, bfloat16=numbers.bfloat16)
    numbers = counted[0]
    threshold = _persistence(
        configs[0], numbers.parameter_sizes, splits_models=first.splits_models()
    )
    with activity.work("building the models"), memory.building_in_memory(first.memory_remedy):
        first.build(
            bfloat16=numbers.bfloat16,
            node_size=numbers.node_size,
            persistence_threshold=threshold,
        )
        for job in jobs[1:]:
            job.take_models_of(first)
    if first.run.batch.micro_batch_size == "auto":
        share = numbers.micro_batch_size * numbers.accumulation
        root = leases[0].root if leases else folders[0]
        size = _probed(jobs, configs, root, share, keep=bool(leases))
        counted = [numbers.with_micro_batch(size) for numbers in counted]
        configs = [ds.fill(json_config, numbers) for numbers in counted]
    for job, config, lease in zip(jobs, configs, leases, strict=bool(leases)):
        write_environment(lease.folder, config, launch.launcher, job.metrics)

    commit = distributed.broadcast_object(source_commit() if distributed.is_main() else None)
    found = []
    for number, (job, config, numbers) in enumerate(zip(jobs, configs, counted, strict=True)):
        engine, ema = _built(job, config)
        code = job.run.code()
        facts = {
            **job.facts(),
            "pictures": samples.fingerprint,
            "commit": commit,
            "recipe": masked(job.run.to_dict()),
            **({"code": code} if code else {}),
        }
        checkpoints = Checkpoints(
            folders[number],
            engine,
            runtime=job.run.runtime,
            global_batch_size=job.run.batch.global_batch_size,
            facts=facts,
            check_stored=job.check_stored,
            lease=leases[number] if leases else None,
        )
        found.append(
            Opened(
                job.run,
                folders[number],
                launch,
                job,
                samples,
                engine,
                checkpoints,
                numbers.micro_batch_size,
                numbers.accumulation,
                ema,
            )
        )
    weights.forget()
    return found


def _built(job: Job, config: dict[str, Any]) -> tuple[Engine, Ema | None]:
    """Builds a job's engine with its initial weights, and the average of the weights if any."""
    decay = job.run.optim.ema_decay
    with (
        activity.work("building the engine"),
        memory.building_in_memory(job.memory_remedy),
    ):
        engine = engine_of(
            job.run,
            job.make_task,
            config,
            initial=job.initial_weights(),
            heads=job.initial_heads(),
        )
    # The average is made before any resume, which restores it too.
    return engine, Ema(engine, decay) if decay else None


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
    if not ds.offloads_to_disk(ds.load(deepspeed_config)):
        run = replace(run, engine=replace(run.engine, nvme_path=""))
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
    jobs: Sequence[Job], deepspeed_config: str, launch: Launch
) -> tuple[dict[str, Any], list[ds.RunNumbers], ImageSource]:
    """Finds the user's mistakes; without a collective, and without a model in memory.

    Returns: the DeepSpeed JSON, the numbers to fill it with for each job (micro batch 1 where it is
        "auto"), and the training samples.
    """
    first = jobs[0]
    checks: list[Callable[[], Any]] = [lambda: ds.load(deepspeed_config), first.open_samples]
    for job in jobs:
        checks += _checks_of(job)
    json_config, samples, *_ = check_all(*checks)
    fixed = first.run.batch.micro_batch_size
    size = 1 if fixed == "auto" else fixed
    check_batch_sizes(
        len(samples),
        global_batch_size=first.run.batch.global_batch_size,
        micro_batch_size=size,
        world_size=launch.world_size,
    )
    counted = []
    for job in jobs:
        run = job.run
        numbers = ds.RunNumbers(
            micro_batch_size=size,
            accumulation=run.batch.global_batch_size // launch.world_size // size,
            world_size=launch.world_size,
            node_size=ds.ranks_of_a_node(run.engine.node_size, launch.local_world_size),
            clip_norm=run.optim.clip_norm,
            bfloat16=ds.computes_in_bfloat16(run.engine.precision),
            parameter_sizes=job.parameter_sizes(),
            nvme_path=run.engine.nvme_path,
            trained_sizes=job.trained_sizes(),
        )
        ds.fill(json_config, numbers)
        counted.append(numbers)
    if folder := first.run.engine.nvme_path:
        needed = _disk_bytes(jobs, counted, json_config) * launch.local_world_size
        disks.check_state_folder(folder, needed)
    for job in jobs:
        for where, source in job.sources().items():
            job.weights.resolve(source, where=f"--{where}").fetch()
    return json_config, counted, samples


def _disk_bytes(
    jobs: Sequence[Job], counted: Sequence[ds.RunNumbers], json_config: dict[str, Any]
) -> int:
    """Returns how much a rank keeps on a disk."""
    total = 0
    for job, numbers in zip(jobs, counted, strict=True):
        place = Placement(
            stage=3,
            world_size=numbers.world_size,
            node_size=numbers.node_size,
            bfloat16=numbers.bfloat16,
            teacher_bfloat16=numbers.bfloat16,
            offload_optimizer=True,
            optimizer_on_disk=True,
            weights_on_disk=ds.offloads_to_disk(json_config, "offload_param"),
        )
        optim = job.run.optim
        kept = len(moments_of(optim)) + bool(optim.ema_decay)
        total += held(numbers.trained_sizes, (), place, moments=kept).disk.total
    return total


def _checks_of(job: Job) -> list[Callable[[], Any]]:
    run = job.run
    return [
        job.check,
        lambda: run.eval.best_metric and check_metric(run.eval.best_metric, job.metrics),
        lambda: moments_of(run.optim, distributed.device().type),
        lambda: trackers_of(run.runtime.trackers),
    ]


def check_kernels(job: Job, *, bfloat16: bool) -> None:
    """Holds the kernels that will run against their references, and gives up what is off."""
    device = distributed.device()
    if not choose.may_run_kernels(device.type):
        return
    calls: list[check.Call] = []
    if distributed.is_main():
        teacher = job.run.frozen_dtype
        # Interpreted on a CPU, they are those of the newest card.
        capability = choose.CAPABILITIES[-1]
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability()
        try:
            calls = kernel_calls(
                job,
                choose.Device(capability, on_gpu=device.type == "cuda", wish=choose.wished()),
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


def _probed(
    jobs: Sequence[Job], configs: Sequence[dict[str, Any]], folder: Path, share: int, *, keep: bool
) -> int:
    """Returns the folder's micro batch, or that of a probe on engines that are thrown away."""
    world_size = distributed.world_size()
    setting, *others = (_memory_of(job, config) for job, config in zip(jobs, configs, strict=True))
    setting |= memory.memory_setting()
    if distributed.is_main():
        setting["software"] = {**versions(), "fd_large": node_consistency.code_hash()}
    if others:
        setting["others"] = others
    size = micro_batch.remembered(folder, setting, share)
    if size is not None:
        return size
    with activity.work("trying micro batches"):
        engines, averages = [], []
        for job, config in zip(jobs, configs, strict=True):
            # Every step of the probe is a whole step, moments included.
            whole = {
                **config,
                "train_micro_batch_size_per_gpu": 1,
                "gradient_accumulation_steps": 1,
                "train_batch_size": world_size,
            }
            engine = engine_of(job.run, job.make_task, whole)
            decay = job.run.optim.ema_decay
            averages.append(Ema(engine, decay) if decay else None)
            engines.append(engine)
        size = share
        for _ in range(2 if others else 1):
            # Once more beside the moments that all have made.
            for engine in engines:
                size = micro_batch.probe(
                    engine,
                    jobs[0].probe_batch,
                    share=share,
                    at_most=size,
                    seed=jobs[0].run.runtime.seed,
                    several=bool(others),
                )
        for engine in engines:
            engine.deepspeed.destroy()
        del engine, engines, averages
        start.forget_engines()
        gc.collect()
        if distributed.device().type == "cuda":
            torch.cuda.empty_cache()
    if keep:
        micro_batch.remember(folder, setting, size)
    log.info("micro batch %d per rank, accumulation %d", size, share // size)
    return size


def _memory_of(job: Job, config: dict[str, Any]) -> dict[str, Any]:
    """Returns what decides the memory of a step."""
    run = job.run
    return {
        "world_size": distributed.world_size(),
        "deepspeed": config["zero_optimization"],
        "bfloat16": config["bf16"]["enabled"],
        # Whoever comes later among several students is held to no stored recipe.
        "student": asdict(run.student),
        "code": run.code(),
        "compile": run.engine.compile,
        "ema": bool(run.optim.ema_decay),
        "kernels": choose.wished(),
        **job.memory_facts(),
    }


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


def _share_cores(local_world_size: int) -> None:
    """Divides a host's cores between its CPU ranks, unless OMP_NUM_THREADS is set.

    A launcher may have given each rank cores of its own already; it never takes more than these.
    """
    if distributed.device().type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        share = (os.cpu_count() or 1) // local_world_size
        torch.set_num_threads(max(1, min(share, len(os.sched_getaffinity(0)))))
