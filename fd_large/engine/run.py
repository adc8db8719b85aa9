"""Trains a run from its recipe to its summary: checks everything, then builds, resumes, trains."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from fd_large.checkpoint.lease import Lease
from fd_large.checkpoint.store import checkpoints_of
from fd_large.data.loader import Batch
from fd_large.data.sampler import Portion, updates_per_epoch
from fd_large.engine.best import Best
from fd_large.engine.counting.count import step_flops
from fd_large.engine.job import JobOf, TrainingJob
from fd_large.engine.loop import Trainer, TrainingPlan
from fd_large.engine.opening import Opened, open_together
from fd_large.engine.run_page import RunPage
from fd_large.engine.schedule import SCHEDULES, Schedule
from fd_large.engine.students import HooksOfAll, train_together
from fd_large.engine.zero.layer_decay import by_layer
from fd_large.engine.zero.trust_ratio import scale_by_norms
from fd_large.errors import CheckpointError, Exit, FDError, first_line
from fd_large.plan.counts import StepFlops
from fd_large.ranks import activity, distributed, failures
from fd_large.ranks.starting import leave_no_more
from fd_large.recipes.file_names import METRICS
from fd_large.recipes.run import LENGTH, Run, difference
from fd_large.runtime.guard import Guard
from fd_large.runtime.hooks import DONE, FAILED, INTERRUPTED, PREEMPTED, Hook, Setting
from fd_large.runtime.meter import Meter
from fd_large.runtime.preemption import Preemption
from fd_large.runtime.profiler import Profiler
from fd_large.runtime.progress import Progress
from fd_large.runtime.run_folder import (
    rows_before,
    status_of,
    summary_of,
    write_status,
)
from fd_large.runtime.save_interval import SaveInterval
from fd_large.runtime.trackers import trackers_of
from fd_large.runtime.watchdog import Watchdog

log = logging.getLogger(__name__)

EXIT_CODES = {DONE: Exit.DONE, PREEMPTED: Exit.AGAIN}
"""Exit codes by status. Any other status gives `Exit.LOOK`, since somebody has to look: a hook
ended the run, or the last state could not be saved."""


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
    """Trains a run to its end, with hooks, watchdog and signal handlers; returns the exit code.

    Args:
        run: The recipe.
        job_of: Makes the job of the recipe's task.
        deepspeed_config: Path of the DeepSpeed JSON.
        lease: The right of this launch of the run to write the run's folder.
        fresh: Whether to start over instead of resuming; if so, the old run's files are moved
            aside.
        profile: Number of steps to trace by torch's profiler, after the first three; 0 traces none.
        hooks: Further hooks besides the recipe's; each student's run calls them.

    Raises: FDError: for the user's mistakes, if possible before training.
    """
    runs = run.each_student()
    leases = [
        lease.inside(Path(student.run_dir())) if name else lease for name, student in runs.items()
    ]
    begun: list[list[Hook]] = [[] for _ in runs]
    ends = [*zip(leases, begun, strict=True), *([(lease, [])] if run.students else [])]
    with _watched(run, lease) as shared, ends_told(ends):
        opened = open_together(
            list(runs.values()),
            job_of,
            deepspeed_config,
            leases,
            whole=(run, lease) if run.students else None,
            fresh=fresh,
            resumes=True,
        )
        trainers = []
        for name, student, inner, hooks_begun in zip(runs, opened, leases, begun, strict=True):
            # torch takes one trace at a time: the first student's is taken.
            steps = profile if student is opened[0] else 0
            student_hooks = hooks_of(student.job, steps, hooks, student=name)
            trainers.append(_trainer_of(student, inner, [*student_hooks, shared], hooks_begun))
        return _train([trainer for trainer in trainers if trainer], opened[0], lease, shared)


@contextmanager
def _watched(run: Run, lease: Lease) -> Iterator[HooksOfAll]:
    """Waits for the other ranks; then catches signals and watches for hangs in the block.

    Yields a hook for the runs of all students, which combines the signal handler and the watchdog.
    """
    with activity.work("meeting the other ranks"):
        launch = distributed.start()
    preemption = preemption_of(run, lease, launch.launcher)
    watchdog = watchdog_of(run, lease)
    if watchdog:
        watchdog.start()
    try:
        # The watchdog is the last, so that it watches what the others do at the end as well.
        yield HooksOfAll([hook for hook in (preemption, watchdog) if hook])
    finally:
        if watchdog:
            watchdog.stop()
        if preemption:
            preemption.close()


def _train(trainers: Sequence[Trainer], opened: Opened, lease: Lease, shared: HooksOfAll) -> int:
    """Trains the students that are not finished; returns the exit code.

    Args:
        trainers: One trainer for each student that is not finished.
        opened: Any of the opened runs, which share images and batches.
        lease: The right to write the folder that contains all students' folders.
        shared: The hooks that all students' runs share.
    """
    if not trainers:
        return 0
    job, size = opened.job, opened.micro_batch_size

    def batches(epoch: int, first_update: int) -> Iterator[Batch]:
        ranks = distributed.rank(), distributed.world_size()
        portion = Portion(epoch, first_update, size, *ranks)
        return job.batches(opened.samples, portion)

    # A job may have much to do before an epoch, such as maps to store.
    job.between_batches = trainers[0].between_batches
    shared.begin([trainer.setting for trainer in trainers], lease.folder)
    try:
        statuses = train_together(trainers, batches)
    except FDError as error:
        error.rank_local = not error.agreed
        raise
    for trainer, status in zip(trainers, statuses, strict=True):
        folder, best = trainer.setting.folder, trainer.best
        if best is not None and distributed.is_main():
            why = {"reason": best.reason()} if trainer.stopped_early else {}
            write_status(folder, status, best=best.to_dict(), **why)
        log.info("%s: %s", status, folder)
    codes = {EXIT_CODES.get(status, Exit.LOOK) for status in statuses}
    code = next(code for code in (Exit.LOOK, Exit.AGAIN, Exit.DONE) if code in codes)
    status = next(status for status in statuses if EXIT_CODES.get(status, Exit.LOOK) == code)
    shared.end(status)
    if lease.folder != opened.folder and distributed.is_main():
        names = [trainer.setting.folder.name for trainer in trainers]
        write_status(lease.folder, status, students=dict(zip(names, statuses, strict=True)))
    return code


def _trainer_of(
    opened: Opened, lease: Lease, hooks: Sequence[Hook], begun: list[Hook]
) -> Trainer | None:
    """Makes the trainer of an opened run, from its present step; None if the run is finished.

    `hooks` watch the run; for `begun` see `Trainer`.
    """
    run, job, engine, checkpoints = opened.run, opened.job, opened.engine, opened.checkpoints
    finished = opened.finished
    per_epoch = updates_per_epoch(len(opened.samples), run.batch.global_batch_size)
    total = run.optim.max_steps or run.optim.epochs * per_epoch
    total = min(total, checkpoints.decided_steps or total)
    best = _best_of(job, opened.folder, finished)
    if _is_over(opened, total, best):
        return None
    checkpoints.log_disk_use(total)
    schedule = _schedule_of(run, per_epoch, total)
    if finished:
        _log_other_length(checkpoints.stored_recipe, run, opened.folder, schedule, finished)
    plan = TrainingPlan(
        schedule,
        per_epoch,
        opened.accumulation,
        run.runtime.seed,
        max_bad_fraction=run.data.max_bad_fraction,
        count_bad_every=run.runtime.log_every,
    )
    setting = _setting_of(opened, lease, total)
    with activity.work("cutting the evaluations' images"):
        evaluations = job.evaluations(engine, opened.samples, opened.micro_batch_size)
    layer_rates = by_layer(engine, run.optim.layer_decay, run.optim.backbone_rate)
    scale_by_norms(engine)
    return Trainer(
        engine,
        plan,
        hooks,
        setting,
        checkpoints=checkpoints,
        evaluations=evaluations,
        layer_rates=layer_rates,
        ema=opened.ema,
        best=best,
        begun=begun,
    )


def _is_over(opened: Opened, total: int, best: Best | None) -> bool:
    """Returns whether a run is finished, and logs that it is finished or resumed.

    A run is finished if its folder says so, and it has all `total` steps or the patience of `best`
    is exhausted.

    Raises: CheckpointError: if the folder says that the run is finished but has no checkpoint.
    """
    folder, finished = opened.folder, opened.finished
    done = distributed.broadcast_object(status_of(folder) == DONE)
    if done and not finished:
        raise CheckpointError(
            f"{checkpoints_of(folder)}: no checkpoint; got a finished run, expected its "
            "checkpoints. Restore these checkpoints, or start over with --fresh."
        )
    if done and (finished >= total or (best is not None and best.exhausted)):
        why = f" ({best.reason()})" if finished < total and best else ""
        log.info("%s: finished after %d steps%s; nothing to do", folder, finished, why)
        return True
    if finished:
        log.info("resumed after step %d of %d", finished, total)
    return False


def _schedule_of(run: Run, steps_per_epoch: int, total: int) -> Schedule:
    """Returns the learning rate schedule of a run of `total` steps.

    If the warm-up takes the whole run, a warning is logged.
    """
    peak, warmup_start, minimum = run.optim.rates(run.batch.global_batch_size)
    warmup = int(run.optim.warmup_epochs * steps_per_epoch)
    if total <= warmup:
        log.warning(
            "optim.warmup_epochs: the whole run of %d steps is warm-up (%d steps): the learning "
            "rate never reaches its peak",
            total,
            warmup,
        )
    drops = {"drops": run.optim.drops} if run.optim.drops else {}
    make = SCHEDULES[run.optim.schedule]
    return make(peak, warmup_start, minimum, total, warmup, **drops)


def _setting_of(opened: Opened, lease: Lease, total: int) -> Setting:
    """Returns the facts that a run's hooks get before the first step."""
    run, job = opened.run, opened.job
    size, accumulation = opened.micro_batch_size, opened.accumulation
    return Setting(
        folder=opened.folder,
        facts=job.summary(),
        first_update=opened.finished,
        total_updates=total,
        global_batch_size=run.batch.global_batch_size,
        micro_batch_size=size,
        accumulation=accumulation,
        world_size=distributed.world_size(),
        log_every=run.runtime.log_every,
        flops=_step_flops(job, size, accumulation),
        image_sizes=run.data.image_sizes,
        checkpoint_bytes=opened.checkpoints.bytes,
        start=lease.start,
        owned=lease.owned,
        metrics=job.metrics,
        evaluated=job.evaluated,
        name_of=opened.samples.__getitem__,
    )


def _best_of(job: TrainingJob, folder: Path, finished: int) -> Best | None:
    """Returns the `Best` of a run's evaluations so far, or None if the recipe names no metric.

    Evaluations in the folder that were made after `finished` steps are left out.
    """
    section = job.run.eval
    if not section.best_metric:
        return None
    metric = next(n for n in job.metrics if n.replace("/", "_") == section.best_metric)
    return Best.of_folder(
        folder,
        finished,
        metric=section.best_metric,
        lower_is_better=metric.partition("/")[2] in job.lower_is_better,
        patience=section.patience,
    )


def _log_other_length(
    stored: dict[str, Any], run: Run, folder: Path, schedule: Schedule, finished: int
) -> None:
    """Logs a warning if a resumed run has another length than its checkpoint's recipe, `stored`.

    `schedule` has the learning rates of the present recipe `run`, and `finished` counts the
    finished steps.
    """
    with suppress(FDError):
        changed = {
            name: values
            for name, values in difference(Run.from_dict(stored), run).items()
            if name in LENGTH
        }
        if not changed or not distributed.is_main():
            return
        rows = rows_before(folder / METRICS, finished)
        last = f" (the last step had {rows[-1]['learning_rate']:.3g})" if rows else ""
        log.warning(
            "%s: ANOTHER SCHEDULE from here on: the run continues from step %d to step %d, where "
            "its schedule ends. The learning rate of the next step is %.3g%s. The result will "
            "differ from that of a run that began with this length.",
            ", ".join(f"{name} {was!r} -> {now!r}" for name, (was, now) in changed.items()),
            finished,
            schedule.total,
            schedule.at_step(finished),
            last,
        )


def _step_flops(
    job: TrainingJob, micro_batch_size: int, micro_batches: int
) -> dict[int, StepFlops]:
    """Returns {side of the images: FLOPs of a micro-batch} on rank 0, and {} on other ranks.

    If the recipe has a single image size, the key is 0. A size whose FLOPs cannot be counted is
    left out. `micro_batches` is the number of micro-batches of a rank in a step.
    """
    if not distributed.is_main():
        return {}
    with activity.work("counting a step's FLOPs"):
        counted = {
            side: step_flops(
                job,
                micro_batch_size,
                checkpointing=job.run.student.activation_checkpointing != "off",
                micro_batches=micro_batches,
                image_size=side,
            )
            for side in job.run.data.image_sizes or (0,)
        }
    return {side: flops for side, flops in counted.items() if flops is not None}


def hooks_of(
    job: TrainingJob, profile: int = 0, more: Sequence[Hook] = (), *, student: str = ""
) -> list[Hook]:
    """Returns the hooks of a run, in the order in which they are called.

    Args:
        job: The job, after its `build`.
        profile: Number of steps to trace; 0 traces none.
        more: Further hooks besides those of recipe and task.
        student: Name of the student among several, or "".
    """
    run = job.run
    hooks: list[Hook] = [
        Meter(trackers=[Progress(student), *trackers_of(run.runtime.trackers), RunPage()]),
    ]
    if run.guard.enabled:
        hooks.append(Guard(run.guard))
    if run.runtime.save_minutes:
        hooks.append(SaveInterval(run.runtime.save_minutes))
    if profile:
        hooks.append(Profiler(profile))
    return [*hooks, *job.hooks(), *more]


def preemption_of(run: Run, lease: Lease, launcher: str) -> Preemption | None:
    """Installs and returns the handler of signals, or returns None if the recipe turns it off.

    Only the main thread of a process can catch signals; in another thread the result is None.
    `launcher` is the name of the program that started the ranks.
    """
    if threading.current_thread() is not threading.main_thread():
        return None
    if not run.runtime.preemption:
        leave_no_more()
        return None
    return Preemption(
        run.runtime.notice_seconds,
        launcher=launcher,
        leaving=lease.will_leave,
        write_status=lambda status: write_end(lease, status, "a second Ctrl-C", first=True),
        ends_process=not distributed.is_guest(),
    )


def watchdog_of(run: Run, lease: Lease) -> Watchdog | None:
    """Makes the watchdog, or returns None if the recipe turns it off.

    In a process that also does other work (`guest.py`), the result is None as well.
    """
    if not run.runtime.watchdog_seconds or distributed.is_guest():
        return None
    return Watchdog(
        run.runtime.watchdog_seconds,
        lease.folder,
        lambda: lease.entered and lease.owned(),
        start=lease.start,
    )


@contextmanager
def ends_told(runs: Sequence[tuple[Lease, Sequence[Hook]]]) -> Iterator[None]:
    """Records in the runs' folders why the runs end: an error in the block, or the loss of a rank.

    `runs` has, for each run, the right of this launch to write its folder, and the hooks whose
    `on_start` has returned.
    """

    def lost(reason: str) -> None:
        for lease, _ in runs:
            write_end(lease, FAILED, reason, first=False)

    failures.last_words.append(lost)
    try:
        yield
    except BaseException as error:
        end_by(error, runs)
        raise
    finally:
        failures.last_words.remove(lost)


def end_by(error: BaseException, runs: Sequence[tuple[Lease, Sequence[Hook]]]) -> None:
    """Tells other ranks and hooks of an error that ends runs, and records it in the runs' folders.

    This function makes no collective, since ranks may be gone. For `runs` see `ends_told`.
    """
    status, code = FAILED, getattr(error, "exit_code", Exit.LOST)
    if isinstance(error, KeyboardInterrupt):
        status, code = INTERRUPTED, Exit.INTERRUPTED
    reason = first_line(error)
    first = not distributed.peer_is_gone(error)
    if first:
        # First tell the other ranks, which wait: the hooks and files below may be slow.
        failures.tell(code, reason)
    elif heard := failures.heard():
        reason = str(heard)
    for lease, watching in runs:
        for hook in watching:
            try:
                hook.on_failure(status, reason)
            except Exception:
                log.exception("the hook %s failed while the run ended", type(hook).__name__)
        write_end(lease, status, reason, first=first)


def write_end(lease: Lease, status: str, reason: str, *, first: bool) -> None:
    """Writes the status with which a run ended, and the reason, into its folder.

    Nothing is written unless this launch of the run has entered the folder and still owns it, nor,
    if `first` is False, if a rank of this launch has already written a status.
    """
    known = summary_of(lease.folder).get("start") == lease.start
    # Before this start has entered the folder, it may hold another run.
    if lease.entered and lease.owned() and (first or not known):
        entry = {"start": lease.start, "rank": distributed.rank(), "reason": reason}
        write_status(lease.folder, status, **entry)
