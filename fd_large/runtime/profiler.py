"""A torch profiler trace of a few updates, for `--profile`.

Written to RUN/profile/ by rank 0; chrome://tracing, ui.perfetto.dev and TensorBoard's profiler
plugin open it. The profiled updates are slower than others: their rate is no figure of the run.
"""

from __future__ import annotations

import logging

import torch
from torch.profiler import ProfilerActivity, profile, schedule

from fd_large import distributed
from fd_large.runtime.hooks import PASS, Hook, Setting, Update, Verdict

log = logging.getLogger(__name__)

UNTRACED, WARM_UP = 2, 1
"""Updates that build caches and workers, then updates in which the profiler itself starts."""


class Profiler(Hook):
    """Traces so many updates, after the first three of this start.

    Args:
        updates: At least one.
    """

    def __init__(self, updates: int) -> None:
        assert updates >= 1
        self._updates = updates
        self._profile: profile | None = None
        self._written = ""
        self._index = -1

    def on_start(self, setting: Setting) -> None:
        """Prepares the trace, on rank 0."""
        if not distributed.is_main():
            return
        activities = [ProfilerActivity.CPU]
        if torch.cuda.is_available():
            activities.append(ProfilerActivity.CUDA)
        first = setting.first_update + UNTRACED + WARM_UP

        def write(finished: profile) -> None:
            # A run may end before the last update that was asked for.
            name = f"updates_{first}_to_{self._index}.pt.trace.json.gz"
            path = setting.folder / "profile" / name
            try:
                path.parent.mkdir(exist_ok=True)
                finished.export_chrome_trace(str(path))
            except (OSError, RuntimeError) as error:  # A full disk is no reason to end a run.
                log.error("--profile: %s was not written: %s", path, error)
                return
            self._written = str(path)

        self._profile = profile(
            activities=activities,
            schedule=schedule(wait=UNTRACED, warmup=WARM_UP, active=self._updates, repeat=1),
            on_trace_ready=write,
            record_shapes=True,
        )
        self._profile.start()

    def after_update(self, update: Update) -> Verdict:
        """Counts the update; after the last traced one, writes the trace."""
        self._index = update.index
        if self._profile is not None:
            self._profile.step()
            if self._written:
                self._stop()
        return PASS

    def on_end(self, status: str) -> None:
        """Says where the trace lies; a run that ends too early has a shorter one, or none."""
        if not distributed.is_main():
            return
        self._stop()
        if self._written:
            log.info("profile: %s; open it in ui.perfetto.dev or TensorBoard", self._written)
        else:
            log.warning(
                "--profile: nothing was traced: the run ended within its first %d updates",
                UNTRACED + WARM_UP,
            )

    def _stop(self) -> None:
        if self._profile is not None:
            # In the middle of the traced updates this writes what there is.
            ending, self._profile = self._profile, None
            ending.stop()
