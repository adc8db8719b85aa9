"""Records a trace of a few steps with torch's profiler, for `--profile`.

Rank 0 writes the trace to RUN/profile/, for chrome://tracing, ui.perfetto.dev or TensorBoard's
profiler plugin. The profiled steps are slower than other steps, which lowers the run's reported
speed. RUN/profile/communication.json has the fraction of the profiled time in which ranks
communicated, and the fraction in which they communicated without computing, which only a trace can
show.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from typing import Any

import torch
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile, schedule

from fd_large.files import write_json
from fd_large.ranks import distributed
from fd_large.runtime.hooks import Hook, Setting, Update

log = logging.getLogger(__name__)

UNTRACED, WARM_UP = 2, 1
"""Number of first steps that are not traced, since they build caches and start workers, and number
of the following steps in which the profiler starts."""


class Profiler(Hook):
    """Traces a number of steps on rank 0, after the first three steps of this launch.

    Args:
        steps: Number of traced steps, at least one.
    """

    def __init__(self, steps: int) -> None:
        assert steps >= 1
        self._steps = steps
        self._profile: profile | None = None
        self._over = False

    def on_start(self, setting: Setting) -> None:
        """Starts torch's profiler, on rank 0."""
        if not distributed.is_main():
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)

        def write(finished: profile) -> None:
            self._over = True
            first = setting.first_update + UNTRACED + WARM_UP
            # A run may end before the last step that was asked for.
            name = f"updates_{first}_to_{setting.first_update + finished.step_num - 1}"
            _write(finished, setting, f"{name}.pt.trace.json.gz")

        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=UNTRACED, warmup=WARM_UP, active=self._steps, repeat=1),
            on_trace_ready=write,
            record_shapes=True,
        )
        self._profile.start()

    def after_update(self, update: Update) -> None:
        """Counts the step, and writes the trace after the last traced step."""
        if self._profile is not None:
            self._profile.step()
            if self._over:
                self._stop()

    def on_end(self, status: str) -> None:
        """Writes the trace of the steps so far, if the run ends before the last step to trace.

        If no step was traced, a warning is logged.
        """
        self._stop()
        if distributed.is_main() and not self._over:
            log.warning(
                "--profile: nothing was traced: the run ended within its first %d steps",
                UNTRACED + WARM_UP,
            )

    def _stop(self) -> None:
        if self._profile is not None:
            # In the middle of the traced steps this writes what there is.
            ending, self._profile = self._profile, None
            ending.stop()


def _write(finished: profile, setting: Setting, name: str) -> None:
    """Writes a trace and communication.json, and logs their contents; an error is only logged.

    Args:
        finished: The profiler with the trace.
        setting: The facts of the run.
        name: Name of the trace's file.
    """
    path = setting.folder / "profile" / name
    shares = communication_shares(finished.events())
    try:
        setting.must_own()
        path.parent.mkdir(exist_ok=True)
        finished.export_chrome_trace(str(path))
        write_json(path.with_name("communication.json"), shares)
    except (OSError, RuntimeError) as error:  # A full disk is no reason to end a run.
        log.error("--profile: %s was not written: %s", path, error)
        return
    log.info("profile: %s; open it in ui.perfetto.dev or TensorBoard", path)
    log.info(
        "profile: communication took %.1f %% of the traced time; in %.1f %% of the traced time "
        "ranks communicated without computing",
        100 * shares["communication"],
        100 * shares["communication_alone"],
    )


Interval = tuple[float, float]


def communication_shares(events: Iterable[Any]) -> dict[str, float]:
    """Computes in which fraction of a trace's time collectives ran, with or without computation.

    On a GPU, NCCL's kernels count as collectives and other kernels as computation. On a CPU, gloo's
    collectives, including their waits for other ranks, count as collectives, and operations on
    other threads as computation.

    Args:
        events: The events of torch's profiler.

    Returns: a dict with `seconds`, the duration of the trace; `communication`, the fraction of this
        time in which collectives ran; and `communication_alone`, the fraction in which collectives
        ran and nothing was computed.
    """
    ours = [event for event in events if event.time_range.end > event.time_range.start]
    on_gpu = [event for event in ours if event.device_type == DeviceType.CUDA]
    shown = on_gpu or [e for e in ours if e.name.startswith(("aten::", "gloo:"))]
    collectives = [e for e in shown if _communicates(e)]
    # What gloo's own threads compute is part of a collective.
    threads = set() if on_gpu else {event.thread for event in collectives}
    others = [e for e in shown if not _communicates(e) and e.thread not in threads]
    every = _joined(shown)
    if not every:
        return {"seconds": 0.0, "communication": 0.0, "communication_alone": 0.0}
    span = every[-1][1] - every[0][0]
    busy, computing = _length(_joined(collectives)), _length(_joined(others))
    return {
        "seconds": span / 1e6,
        "communication": busy / span,
        # |A without B| = |A or B| - |B|.
        "communication_alone": (_length(_joined([*collectives, *others])) - computing) / span,
    }


def _communicates(event: Any) -> bool:
    return event.name.startswith("gloo:") or "nccl" in event.name.lower()


def _joined(events: Iterable[Any]) -> list[Interval]:
    """Returns the union of the time intervals of `events`, as sorted and disjoint (begin, end)."""
    joined: list[Interval] = []
    for begin, end in sorted((e.time_range.start, e.time_range.end) for e in events):
        if joined and begin <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(joined[-1][1], end))
        else:
            joined.append((begin, end))
    return joined


def _length(intervals: list[Interval]) -> float:
    return sum(end - begin for begin, end in intervals)
