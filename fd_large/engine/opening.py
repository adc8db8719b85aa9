"""Opens a run: settles and checks its recipe, prepares its folder, builds its models and engine.

A run passes through four stages, each of which is a function: `settle` sets the fields of the
recipe that the weights decide, `check` looks for the user's mistakes, `enter` prepares the run's
folder, and `build` makes the engine. `open_together` leads the runs of several students through
each stage together. Between two stages it handles what the runs share: mistakes, images, frozen
models, the start of DeepSpeed and the probe of a micro batch size. The caller must have claimed the
run's folder before the first stage.
"""

from __future__ import annotations

import gc
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from functools import cache, partial
from math import lcm
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fd_large.checkpoint.lease import Lease
from fd_large.data.blocks import keep_blocks_in
from fd_large.data.sampler import check_batch_sizes
from fd_large.data.source import ImageSource
from fd_large.engine import memory, node_consistency
from fd_large.engine.checkpoint_models import sources_of
from fd_large.engine.checkpoints import Checkpoints
from fd_large.engine.counting import micro_batch
from fd_large.engine.counting.count import check_kernels
from fd_large.engine.ema import Ema
from fd_large.engine.job import JobOf, TrainingJob
from fd_large.engine.student import check_norm_batch, group_norms
from fd_large.engine.task import Task
from fd_large.engine.zero import config as ds
from fd_large.engine.zero import start
from fd_large.engine.zero.engine import Engine, InitialWeights, build_engine
from fd_large.engine.zero.optimizer import moments_of
from fd_large.errors import FDError, check_all, masked
from fd_large.kernels import choose
from fd_large.kernels.precision import full_float32
from fd_large.plan.memory import Placement, held, persistence_threshold
from fd_large.ranks import activity, distributed, meeting
from fd_large.ranks.launch import Launch
from fd_large.recipes.run import Run
from fd_large.recipes.stored import read_recipe
from fd_large.recipes.task_kind import check_metric
from fd_large.runtime import disks, logs
from fd_large.runtime.run_folder import (
    open_folder,
    record_code,
    source_commit,
    versions,
    write_environment,
)
from fd_large.runtime.trackers import trackers_of
from fd_large.weights.resolve import Sources

log = logging.getLogger(__name__)


class Checked(NamedTuple):
    """A run whose recipe is complete and checked, and of which no model is built yet.

    Attributes:
        job: The job of the recipe, with all fields set that the weights decide.
        samples: The training images, which all students share.
        numbers: Numbers from recipe, ranks and model that fill the DeepSpeed JSON.
        config: The filled DeepSpeed JSON, of micro batch size 1 until a probe has found the size.
    """

    job: TrainingJob
    samples: ImageSource
    numbers: ds.RunNumbers
    config: dict[str, Any]


class Opened(NamedTuple):
    """A run whose models and engine are built.

    Attributes:
        run: The recipe, with all fields set that the weights decide.
        job: The recipe's job, with its frozen models built.
        samples: The training images.
        engine: The task in its engine.
        checkpoints: Saves and restores the engine's state.
        micro_batch_size: Images per rank and forward.
        accumulation: Micro batches of a rank per step.
        ema: Moving average of the weights, or None.
        finished: Number of finished steps of the restored checkpoint; 0 if none was restored.
    """

    run: Run
    folder: Path
    job: TrainingJob
    samples: ImageSource
    engine: Engine
    checkpoints: Checkpoints
    micro_batch_size: int
    accumulation: int
    ema: Ema | None
    finished: int = 0


def open_together(
    runs: Sequence[Run],
    job_of: JobOf,
    deepspeed_config: str,
    leases: Sequence[Lease | None],
    *,
    whole: tuple[Run, Lease] | None = None,
    fresh: bool = False,
    resumes: bool = False,
) -> list[Opened]:
    """Opens runs that differ only in their students; they share images and frozen models.

    Args:
        runs: The recipes.
        job_of: Makes the job of the recipes' task.
        deepspeed_config: Path of the DeepSpeed JSON.
        leases: For each run the right of this launch of the run to write its folder; None if
            nothing is to be written there.
        whole: The recipe of all students and the right to write the folder that contains their
            folders, or None for a single run.
        fresh: Whether to start over; if so, the old run's files are moved aside.
        resumes: Whether the newest checkpoints are restored.

    Raises: FDError: for the user's mistakes, if possible before models are built.
    """
    launch = distributed.start()
    _share_cores(launch.local_world_size)
    weights = sources_of(job_of, settled=_settled_before([] if fresh else runs))
    load_config = cache(partial(ds.load, deepspeed_config))
    jobs = _settle_each(runs, job_of, weights, load_config)
    checked = _check_each(jobs, load_config, launch)

    entered = [whole] if whole else []
    entered += [(job.run, lease) for job, lease in zip(jobs, leases, strict=True) if lease]
    for recipe, run_lease in entered:
        # The folder of the first holds those of the others, and is moved aside with them.
        is_outermost = run_lease is entered[0][1]
        enter(recipe, run_lease, fresh=fresh and is_outermost)
    if entered:
        logs.set_up(entered[0][1].root)

    _start_deepspeed()
    _build_models(checked)
    if jobs[0].run.batch.micro_batch_size == "auto":
        folder = entered[0][1].root if entered else Path(jobs[0].run.run_dir())
        checked = _with_probed_micro_batch(checked, folder, keep=bool(entered))
    opened = [build(run, lease, launch) for run, lease in zip(checked, leases, strict=True)]
    weights.forget()
    return [resume(run) for run in opened] if resumes else opened


def _share_cores(local_world_size: int) -> None:
    """Divides a host's cores between its CPU ranks.

    Nothing is done on a GPU, or if OMP_NUM_THREADS is set. A launcher may have bound each rank to
    some cores; a rank never uses more threads than these.
    """
    if distributed.device().type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        share = (os.cpu_count() or 1) // local_world_size
        torch.set_num_threads(max(1, min(share, len(os.sched_getaffinity(0)))))


# --- what weights decide ---


def _settled_before(runs: Sequence[Run]) -> dict[str, tuple[float, ...]]:
    """Returns {source: image statistics} from the stored recipes of those runs that have begun.

    The sources are those of the frozen models, and of the students' initial weights with the value
    (). Earlier versions guessed statistics that a recipe now has to state; a run that began with
    guessed statistics keeps them.
    """
    statistics: dict[str, tuple[float, ...]] = {}
    for run in runs:
        with suppress(FDError, OSError, AttributeError):  # `open_folder` says what is wrong.
            stored = read_recipe(run.run_dir(), where="--runtime.run_dir")
            models = stored.frozen_models.values()
            statistics |= {stored.student.init: ()} | {m.source: m.statistics for m in models}
    return distributed.broadcast_object(statistics)


def _settle_each(
    runs: Sequence[Run], job_of: JobOf, weights: Sources, *others: Callable[[], Any]
) -> list[TrainingJob]:
    """Calls `settle` for each recipe, and returns the jobs of the completed recipes.

    All ranks must call this function. `weights` opens the recipes' weights. The errors of `others`,
    further checks, are reported together with those of the weights.
    """
    with activity.work("reading images and weights"):
        settled = meeting.meet(
            lambda: check_all(*(partial(settle, job_of(run), weights, others) for run in runs))
        )
    # If a source is still being trained, ranks may have found different checkpoints.
    jobs = [job_of(run) for run in distributed.broadcast_object(settled)]
    for job in jobs:
        job.weights = weights
    keep_blocks_in(jobs[0].run.data.cache, jobs[0].run.data.cache_gb)
    return jobs


def settle(job: TrainingJob, weights: Sources, others: Sequence[Callable[[], Any]] = ()) -> Run:
    """Returns the job's recipe with those fields set that its weights decide.

    See `TrainingJob.settle`. The further checks `others` are called only if weights do not fit.

    Raises:
        FDError: If weights do not fit the recipe. The message also names mistakes that `others`
            find, and mistakes in the training samples.
    """
    try:
        return job.settle(weights)
    except FDError as error:
        mistake = error

    def refused() -> Run:
        raise mistake

    settled, *_ = check_all(refused, *others, job.open_samples)
    return settled


# --- mistakes ---


def _check_each(
    jobs: Sequence[TrainingJob], load_config: Callable[[], dict[str, Any]], launch: Launch
) -> list[Checked]:
    """Checks all runs and compares the nodes; all ranks must call this function.

    `load_config` returns the DeepSpeed JSON, which is read only at the first call.
    """
    open_samples = cache(jobs[0].open_samples)

    def check_all_runs() -> list[Checked]:
        checks = (partial(check, job, load_config, open_samples, launch) for job in jobs)
        checked: list[Checked] = check_all(*checks)
        if folder := jobs[0].run.engine.nvme_path:
            needed = sum(map(_disk_bytes, checked)) * launch.local_world_size
            disks.check_state_folder(folder, needed)
        for job in jobs:
            _fetch_weights(job)
        return checked

    with activity.work("checking the recipe"):
        checked = meeting.meet(check_all_runs)
    _compare_nodes(jobs, checked[0].samples)
    return checked


def check(
    job: TrainingJob,
    load_config: Callable[[], dict[str, Any]],
    open_samples: Callable[[], ImageSource],
    launch: Launch,
) -> Checked:
    """Checks a run for the user's mistakes, without a collective and without a model in memory.

    `job` is that of the recipe that `settle` returned.

    Raises: FDError: for the user's mistakes; the message names all that can be found at once.
    """
    run = job.run
    config, samples, *_ = check_all(
        load_config,
        open_samples,
        job.check,
        lambda: run.eval.best_metric and check_metric(run.eval.best_metric, job.metrics),
        lambda: moments_of(run.optim, distributed.device().type),
        lambda: trackers_of(run.runtime.trackers),
    )
    size = run.batch.micro_batch_size
    check_batch_sizes(
        len(samples),
        global_batch_size=run.batch.global_batch_size,
        micro_batch_size=1 if size == "auto" else size,
        world_size=launch.world_size,
    )
    side, ranks = min(run.data.sides), launch.world_size
    check_norm_batch(run.student, job.norm_group(), run.batch, image_size=side, world_size=ranks)
    numbers = _numbers(job, launch)
    return Checked(job, samples, numbers, ds.fill(config, numbers))


def _numbers(job: TrainingJob, launch: Launch) -> ds.RunNumbers:
    """Returns the numbers from recipe, ranks and model that fill the DeepSpeed JSON."""
    run, size = job.run, job.run.batch.micro_batch_size
    sizes, is_probed = job.tensor_sizes(), size == "auto"
    size = 1 if size == "auto" else size
    return ds.RunNumbers(
        micro_batch_size=size,
        accumulation=run.batch.global_batch_size // launch.world_size // size,
        world_size=launch.world_size,
        node_size=ds.ranks_of_a_node(run.engine.node_size, launch.local_world_size),
        clip_norm=run.optim.clip_norm,
        bfloat16=ds.computes_in_bfloat16(run.engine.precision),
        parameter_sizes=sizes.trained + sizes.frozen,
        nvme_path=run.engine.nvme_path,
        trained_sizes=sizes.trained,
        is_probed=is_probed,
    )


def _disk_bytes(checked: Checked) -> int:
    """Returns the bytes that each rank keeps on the disk in a run that offloads to a disk."""
    optim, numbers = checked.job.run.optim, checked.numbers
    place = Placement(
        stage=3,
        world_size=numbers.world_size,
        node_size=numbers.node_size,
        bfloat16=numbers.bfloat16,
        teacher_bfloat16=numbers.bfloat16,
        offload_optimizer=True,
        optimizer_on_disk=True,
        weights_on_disk=ds.offloads_to_disk(checked.config, "offload_param"),
    )
    moments = len(moments_of(optim)) + bool(optim.ema_decay)
    return held(numbers.trained_sizes, (), place, moments=moments).disk.total


def _fetch_weights(job: TrainingJob) -> None:
    """Downloads the weights that a library would otherwise download when it reads them.

    Must be called inside `meeting.meet`.
    """
    for where, source in job.sources().items():
        job.weights.resolve(source, where=f"--{where}").fetch()


def _compare_nodes(jobs: Sequence[TrainingJob], samples: ImageSource) -> None:
    """Compares code, images and weights of all nodes; all ranks must call this function."""
    for job in jobs:
        node_consistency.check(samples, job.sources(), job.weights, job.run.code())


# --- the folder ---


def enter(run: Run, lease: Lease, *, fresh: bool) -> None:
    """Writes the settled recipe into the run's folder, and marks the lease as entered.

    With `fresh`, the files of an earlier run are moved aside first.

    Raises: ConfigError: if the folder cannot be used or holds a run with other settings.
    """
    start_anew = lease.start_anew if fresh else None
    open_folder(lease.folder, run.to_dict(), run.changes_since, start_anew=start_anew)
    lease.entered = True


# --- what is heavy ---


def _start_deepspeed() -> None:
    with activity.work("starting DeepSpeed"):
        start.start()
    full_float32(distributed.device())


def _build_models(checked: Sequence[Checked]) -> None:
    """Checks the kernels of all runs, and builds the frozen models, which all students share."""
    for run in checked:
        check_kernels(run.job, bfloat16=run.numbers.bfloat16)
    first, *others = (run.job for run in checked)
    numbers, config = checked[0].numbers, checked[0].config
    log.debug(
        "gradients: summed over %d ranks in %s",
        numbers.world_size,
        config["communication_data_type"],
    )
    sizes, zero = numbers.parameter_sizes, config["zero_optimization"]
    threshold = zero.get("stage3_param_persistence_threshold", persistence_threshold(sizes))
    whole_elements = sum(size for size in sizes if size <= threshold)
    log.debug(
        "whole on every rank where models are split: tensors of at most %d elements, %.2f%% of all",
        threshold,
        100 * whole_elements / sum(sizes),
    )
    _build_frozen(first, numbers, threshold)
    for other in others:
        other.take_models_of(first)


def _build_frozen(job: TrainingJob, numbers: ds.RunNumbers, persistence_threshold: int) -> None:
    """Builds the frozen models of a task; all ranks must call this function.

    `numbers` has the precision and the number of ranks per node. For `persistence_threshold` see
    `TrainingJob.build`.
    """
    with activity.work("building the models"), memory.building_in_memory(job.memory_remedy):
        job.build(
            bfloat16=numbers.bfloat16,
            node_size=numbers.node_size,
            persistence_threshold=persistence_threshold,
        )


def _with_probed_micro_batch(
    checked: Sequence[Checked], folder: Path, *, keep: bool
) -> list[Checked]:
    """Returns the runs with a micro batch size, read from the folder or found by a probe.

    The runs have their frozen models built. `folder` is that of the whole run, which contains all
    students' folders; `keep` tells whether to store the probe's result there.
    """
    share = checked[0].numbers.accumulation
    setting, *others = map(_memory_of, checked)
    setting |= memory.memory_setting()
    if distributed.is_main():
        setting["software"] = {**versions(), "fd_large": node_consistency.code_hash()}
    if others:
        setting["others"] = others
    size = micro_batch.remembered(folder, setting, share)
    if size is None:
        with activity.work("trying micro batches"):
            size = _probed(checked, share)
        if keep:
            micro_batch.remember(folder, setting, size)
        log.info("micro batch %d per rank, accumulation %d", size, share // size)
    return [
        run._replace(config=ds.with_micro_batch(run.config, size, share // size)) for run in checked
    ]


def _memory_of(checked: Checked) -> dict[str, Any]:
    """Returns the facts about a run that decide a step's memory, by name."""
    run, config = checked.job.run, checked.config
    return {
        "world_size": distributed.world_size(),
        "deepspeed": config["zero_optimization"],
        "bfloat16": config["bf16"]["enabled"],
        # No stored recipe is compared with a student that a later start adds.
        "student": asdict(run.student),
        "code": run.code(),
        "compile": run.engine.compile,
        "ema": bool(run.optim.ema_decay),
        "kernels": choose.wished(),
        **checked.job.memory_facts(),
    }


def _probed(checked: Sequence[Checked], share: int) -> int:
    """Returns the micro batch size that a probe finds with temporary engines of all students.

    `share` is the number of images of a rank in a step.
    """
    first, engines, averages = checked[0].job, [], []
    for checked_run in checked:
        # Every step of the probe is a whole step, moments included.
        run, config = checked_run.job.run, ds.with_micro_batch(checked_run.config, 1, 1)
        engine = engine_of(run, checked_run.job.make_task, config)
        averages.append(_average_of(engine, run))
        engines.append(engine)
    seed = first.run.runtime.seed
    norms = (norm for engine in engines for norm in engine.task.student_norms())
    together = lcm(*(max(norm.norm_groups.size, 1) for norm in norms))
    size = micro_batch.probe(engines, first.probe_batch, share=share, together=together, seed=seed)
    for engine in engines:
        engine.deepspeed.destroy()
    del engine, engines, averages
    start.forget_engines()
    gc.collect()
    if distributed.device().type == "cuda":
        torch.cuda.empty_cache()
    return size


def build(checked: Checked, lease: Lease | None, launch: Launch) -> Opened:
    """Builds a run's engine with its initial weights, and the object that saves its checkpoints.

    The run has its frozen models built. Without a lease, nothing is written into its folder.
    """
    job, run = checked.job, checked.job.run
    folder = Path(run.run_dir())
    if lease:
        write_environment(
            lease.folder, checked.config, launch.launcher, job.metrics, job.lower_is_better
        )
    with activity.work("building the engine"), memory.building_in_memory(job.memory_remedy):
        engine = engine_of(
            run,
            job.make_task,
            checked.config,
            initial=job.initial_weights(),
        )
    _say_without_drop_path(run, engine.task.student)
    # The average is made before any resume, which restores it too.
    ema = _average_of(engine, run)
    code, commit = run.code(), source_commit() if distributed.is_main() else None
    facts = {
        **job.facts(),
        "pictures": checked.samples.fingerprint,
        "commit": distributed.broadcast_object(commit),
        "recipe": masked(run.to_dict()),
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
        job,
        checked.samples,
        engine,
        checkpoints,
        checked.config[ds.MICRO_BATCH],
        checked.config[ds.ACCUMULATION],
        ema,
    )


def _say_without_drop_path(run: Run, student: nn.Module) -> None:
    sets_drop_path = run.student.drop_path_rate and any(True for _ in student.parameters())
    if sets_drop_path and not any(student.drop_path_rates):
        log.info(
            "student.drop_path_rate: %s has no drop path and is trained without it",
            run.student.model,
        )


def engine_of(
    run: Run,
    make: Callable[[], Task],
    config: dict[str, Any],
    *,
    initial: InitialWeights | None = None,
) -> Engine:
    """Builds a task in its engine as the recipe says, and sets the groups of its batch norms.

    `make` constructs the task, and `config` is the filled DeepSpeed JSON. `initial` has the weights
    of the modules that do not start at random; None if all start at random.
    """
    engine = build_engine(
        make,
        config,
        optim=run.optim,
        seed=run.runtime.seed,
        compile_blocks=run.engine.compile == "blocks",
        activation_checkpointing=run.student.activation_checkpointing,
        checkpoint_every=run.student.checkpoint_every,
        whole_first=run.student_architecture().whole_first,
        initial=initial,
    )
    images, micro_batch = run.batch.global_batch_size, config[ds.MICRO_BATCH]
    group_norms(engine.task, run.norm_batch(), global_batch=images, micro_batch=micro_batch)
    return engine


def _average_of(engine: Engine, run: Run) -> Ema | None:
    """Returns a moving average of the engine's weights, or None if the recipe sets no decay."""
    return Ema(engine, run.optim.ema_decay) if run.optim.ema_decay else None


def resume(opened: Opened) -> Opened:
    """Restores the newest sound checkpoint, if any, and returns the run with `finished` set."""
    opened.checkpoints.sweep()
    with activity.work("reading the last checkpoint"):
        finished = opened.checkpoints.resume()
    record_code(opened.folder, opened.run.code(), finished)
    return opened._replace(finished=finished)


# --- other ways to open ---


def open_run(
    run: Run,
    job_of: JobOf,
    *,
    deepspeed_config: str,
    lease: Lease | None = None,
) -> Opened:
    """Opens a single run without restoring a checkpoint; for parameters see `open_together`."""
    (opened,) = open_together([run], job_of, deepspeed_config, [lease])
    return opened


def open_stored(
    folder: str, job_of: JobOf, *, deepspeed_config: str, where: str, lease: Lease | None = None
) -> Opened:
    """Opens a stored run again, even if its folder has moved.

    For the other arguments see `open_together`; `where` is the command, for messages.
    """
    run = read_recipe(folder, where=where)
    run = replace(run, runtime=replace(run.runtime, run_dir=folder))
    if not ds.offloads_to_disk(ds.load(deepspeed_config)):
        run = replace(run, engine=replace(run.engine, nvme_path=""))
    return open_run(run, job_of, deepspeed_config=deepspeed_config, lease=lease)


def open_frozen(run: Run, job_of: JobOf) -> tuple[TrainingJob, ImageSource]:
    """Checks a recipe and builds the models that its run uses and does not train.

    All ranks must call this function. The frozen models are sharded and compute as in the run
    itself. Neither student nor engine is built.

    Returns: the job of the recipe, with all fields set that the weights decide; the training
        images.
    Raises: FDError: for the user's mistakes, before models are built.
    """
    launch = distributed.start()
    weights = sources_of(job_of)
    (job,) = _settle_each([run], job_of, weights)

    def check_frozen() -> tuple[ImageSource, ds.RunNumbers]:
        samples, _ = check_all(job.open_samples, job.check)
        numbers = _numbers(job, launch)
        _fetch_weights(job)
        return samples, numbers

    with activity.work("checking the recipe"):
        samples, numbers = meeting.meet(check_frozen)
    _compare_nodes([job], samples)
    _start_deepspeed()
    _build_frozen(job, numbers, persistence_threshold(numbers.parameter_sizes))
    weights.forget()
    return job, samples
