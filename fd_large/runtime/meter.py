"""Writes the metrics of a run: metrics.jsonl, evaluations.jsonl, and at the end summary.json.

Trackers (progress bar, TensorBoard) get the rows after they are written.
"""

from __future__ import annotations

import json
import logging
import os
import resource
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from fd_large.files import kind_of, replacing, write_json
from fd_large.plan.utilisation import peak_flops, shares
from fd_large.ranks import distributed
from fd_large.recipes.file_names import EVALUATIONS, METRICS, SUMMARY
from fd_large.runtime import step_clock
from fd_large.runtime.hooks import Hook, Row, Setting, Tracker, Update
from fd_large.runtime.run_folder import (
    cut_before,
    summary_of,
    written_or_logged,
)
from fd_large.runtime.trackers import Trackers

log = logging.getLogger(__name__)


class Meter(Hook):
    """Writes metrics.jsonl (a row for each step), evaluations.jsonl and summary.json on rank 0.

    Also after a resume, metrics.jsonl has one row for each step, and evaluations.jsonl one row for
    each evaluation, in order.

    Args:
        trackers: The trackers, which are called on rank 0 in this order.
    """

    def __init__(self, trackers: Sequence[Tracker] = ()) -> None:
        self._trackers = Trackers(trackers)

    def on_start(self, setting: Setting) -> None:
        """Starts to measure the speed.

        After a resume, the rows of metrics.jsonl and evaluations.jsonl that the run will write
        again are removed first.

        Args:
            setting: The facts of the run.
        """
        self._setting = setting
        self._pending: list[Update] = []
        self._written = 0
        self._losses: tuple[float, float] | None = None
        self._evaluations: dict[int, dict[str, float]] = {}
        self._unwritten: list[str] = []
        self._rows_file = setting.folder / METRICS
        self._evaluations_file = setting.folder / EVALUATIONS
        if not distributed.is_main():
            self._trackers = Trackers(())
        else:
            self._note_losses(cut_before(self._rows_file, setting.first_update))
            # An evaluation after exactly `first_update` steps is kept.
            for row in self._evaluations_before(setting.first_update + 1):
                self._evaluations[row.pop("update")] = row
            self._write_evaluations()
        device = distributed.device()
        on_gpu = device.type == "cuda"
        self._peak = peak_flops(torch.cuda.get_device_name(device)) if on_gpu else None
        self._trackers.tell("on_start", setting)
        self._seconds = self._interval_seconds = self._waited = 0.0
        # Numbers of steps by image size and number of students, and seconds by image size.
        self._timed: Counter[tuple[int, int]] = Counter()
        self._seconds_of: defaultdict[int, float] = defaultdict(float)
        self._mark = step_clock.now()

    def after_update(self, update: Update) -> None:
        """Records a step's numbers, and writes rows after each `log_every` steps and the last step.

        Args:
            update: The numbers of the step.
        """
        now = step_clock.now()
        self._interval_seconds += now - self._mark
        if self._written or self._pending:
            # The first step also allocates and compiles, and does not count for the speed.
            self._seconds += now - self._mark
            self._waited += update.data_seconds
            self._timed[update.image_size, update.students] += 1
            self._seconds_of[update.image_size] += now - self._mark
        self._mark = now
        self._pending.append(update)
        self._trackers.tell("on_step", update)
        done = update.index + 1
        if done == self._setting.total_updates or done % self._setting.log_every == 0:
            self._flush()

    def on_save(self, index: int) -> None:
        """Writes all pending rows before a checkpoint, since a resume needs them.

        Args:
            index: Number of finished steps; not used.
        """
        self._flush()

    def on_evaluation(self, index: int, metrics: dict[str, float]) -> None:
        """Records the metrics of the evaluation after `index` steps, and writes evaluations.jsonl.

        Metrics that are already recorded for the same `index` are kept, unless `metrics` has new
        values for them. The file is written on rank 0.

        Args:
            index: Number of finished steps.
            metrics: {name: value} of the evaluation.
        """
        if distributed.is_main():
            self._evaluations.setdefault(index, {}).update(metrics)
            self._write_evaluations()
        self._trackers.tell("on_evaluation", index, metrics)

    def on_end(self, status: str) -> None:
        """Writes pending rows, and summary.json with the largest peak memory of all ranks.

        All ranks must call this method.

        Args:
            status: How the run ended.
        """
        self._flush()
        peak = int(distributed.max_rank(peak_memory_bytes()))
        if distributed.is_main():
            path = self._setting.folder / SUMMARY
            with written_or_logged(path):
                self._setting.must_own()
                write_json(path, self._summary(status, peak))
        self._trackers.tell("on_end", status)

    def on_failure(self, status: str, reason: str) -> None:
        """Writes pending rows, and summary.json with rank 0's peak memory, without a collective.

        A status and reason that another rank has already written in this launch are kept.

        Args:
            status: "failed" or "interrupted".
            reason: The error in a sentence.
        """
        self._flush()
        if distributed.is_main():
            path = self._setting.folder / SUMMARY
            with written_or_logged(path):
                self._setting.must_own()
                ending = {**self._summary(status, peak_memory_bytes()), "reason": reason}
                known = summary_of(self._setting.folder)
                if known.get("start") == self._setting.start:
                    # A rank of this start that ended first has recorded the cause.
                    ending |= {name: known[name] for name in ("status", "reason") if name in known}
                write_json(path, ending)
        self._trackers.tell("on_end", status)

    def _summary(self, status: str, peak_memory: int) -> dict[str, Any]:
        setting = self._setting
        timed = max(0, self._written - 1)
        images = timed * setting.global_batch_size
        first = self._evaluations[min(self._evaluations)] if self._evaluations else {}
        last: dict[str, float] = {}
        for index in sorted(self._evaluations):
            last |= self._evaluations[index]
        loss_start, loss_end = self._losses or (None, None)
        return {
            "status": status,
            "start": setting.start,
            **setting.facts,
            "updates": setting.first_update + self._written,
            "total_updates": self._setting.total_updates,
            "world_size": setting.world_size,
            "device": distributed.device().type,
            "global_batch_size": setting.global_batch_size,
            "micro_batch_size": setting.micro_batch_size,
            "accumulation": setting.accumulation,
            "loss_start": loss_start,
            "loss_end": loss_end,
            **setting.evaluated(first, last),
            "images_per_second": images / self._seconds if images > 0 else None,
            **self._speed_of_sizes(),
            **self._shares(self._timed.elements(), self._seconds),
            "data_wait": self._waited / self._seconds if timed else None,
            "peak_memory_bytes": peak_memory,
        }

    def _speed_of_sizes(self) -> dict[str, dict[int, float]]:
        """Returns {"images_per_second_of_sizes": {side of images in pixels: images per second}}.

        The result is empty in a run with a single image size.
        """
        if not self._setting.image_sizes:
            return {}
        steps: Counter[int] = Counter()
        for (size, _), number in self._timed.items():
            steps[size] += number
        images = self._setting.global_batch_size
        of_sizes = {size: steps[size] * images / self._seconds_of[size] for size in sorted(steps)}
        return {"images_per_second_of_sizes": of_sizes}

    def _shares(self, steps: Iterable[tuple[int, int]], seconds: float) -> dict[str, float]:
        """Returns the TFLOP/s and utilisation of the given steps (`utilisation.shares`).

        Args:
            steps: (image size, number of students) of each step.
            seconds: Duration of all these steps together.
        """
        flops = self._setting.flops
        counted = [flops[size].shared_by(students) for size, students in steps if size in flops]
        accumulation = self._setting.accumulation
        return shares(counted, self._peak, micro_batches=accumulation, seconds=seconds)

    def _flush(self) -> None:
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        seconds, self._interval_seconds = self._interval_seconds, 0.0
        self._written += len(pending)
        if not distributed.is_main():
            return
        interval = {
            "images_per_second": len(pending) * self._setting.global_batch_size / seconds,
            **self._shares([(update.image_size, update.students) for update in pending], seconds),
            "data_wait": sum(update.data_seconds for update in pending) / seconds,
            "memory_bytes": peak_memory_bytes(),
        }
        rows = [
            {
                "update": update.index,
                "epoch": update.epoch,
                "loss": update.loss,
                "grad_norm": update.grad_norm,
                "learning_rate": update.learning_rate,
                **interval,
                **({"image_size": update.image_size} if update.image_size else {}),
                **({"skipped": True} if update.skipped else {}),
            }
            for update in pending
        ]
        self._note_losses(rows)
        self._unwritten += [json.dumps(row) + "\n" for row in rows]
        self._append()
        self._trackers.tell("on_rows", rows)

    def _note_losses(self, rows: Sequence[Row]) -> None:
        """Records the first loss of the run, unless it is known, and the newest loss.

        Args:
            rows: Rows of metrics.jsonl, in order; those of skipped steps are not used.
        """
        losses = [row["loss"] for row in rows if not row.get("skipped")]
        if losses:
            self._losses = ((self._losses or losses)[0], losses[-1])

    def _append(self) -> None:
        """Appends all unwritten rows to metrics.jsonl, or none if a write fails.

        On a full disk, the rows are written at the end of a later interval.
        """
        size = None
        try:
            self._setting.must_own()
            with self._rows_file.open("a") as file:
                size = file.tell()
                file.writelines(self._unwritten)
        except OSError as error:
            if size is not None and self._setting.owned():
                os.truncate(self._rows_file, size)
            log.error(
                "%s: %d rows could not be written yet: %s",
                self._rows_file,
                len(self._unwritten),
                error,
            )
            return
        self._unwritten = []

    def _evaluations_before(self, update: int) -> list[Row]:
        path = self._evaluations_file
        return cut_before(path, update) if kind_of(path) else []

    def _write_evaluations(self) -> None:
        path = self._evaluations_file
        if not self._evaluations and not kind_of(path):
            return
        rows = [{"update": index, **row} for index, row in sorted(self._evaluations.items())]
        # All rows are written each time, also those that an earlier full disk refused.
        with written_or_logged(path):
            self._setting.must_own()
            with replacing(path) as aside:
                aside.write_text("".join(json.dumps(row) + "\n" for row in rows))


def peak_memory_bytes() -> int:
    """Returns this rank's peak memory in bytes.

    It is the memory that torch allocated on the rank's GPU, or, without a GPU, the memory of the
    process.
    """
    device = distributed.device()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
