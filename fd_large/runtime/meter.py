"""The numbers of a run: metrics.jsonl, evaluations.jsonl, and at the end summary.json.

Whoever shows them (progress bar, TensorBoard) is handed the rows as they are written.
"""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from fd_large import distributed
from fd_large.plan.utilisation import peak_of, shares, step_flops
from fd_large.runtime.hooks import PASS, Hook, Setting, Update, Verdict
from fd_large.runtime.run_folder import write_json, written_or_told

log = logging.getLogger(__name__)

Row = dict[str, Any]
"""A line of metrics.jsonl: update (from 0), epoch, loss, grad_norm, learning_rate, and skipped:
true where weights stayed. The same in all rows of an interval: images_per_second (of all ranks),
data_wait (share of the time that rank 0 waited for images), memory_bytes (the most that rank 0
has held so far), and, where the models are countable, tflops_per_gpu, and where the card's peak is
known, mfu and hardware_utilisation (plan/utilisation.py)."""


class Meter(Hook):
    """Writes metrics.jsonl (a row a step), evaluations.jsonl and summary.json on rank 0.

    After a resume each step and each evaluation still stands in its file once and in order.
    """

    def __init__(self, on_rows: Sequence[Callable[[list[Row]], None]] = ()) -> None:
        """Takes what is called on rank 0 with the rows of each interval, once they are written."""
        self._on_rows = on_rows

    def on_start(self, setting: Setting) -> None:
        """Opens the files, without the rows that the run will write again."""
        self._setting = setting
        self._total = setting.total_updates
        self._pending: list[Update] = []
        self._written = 0
        self._first_loss: float | None = None
        self._last_loss: float | None = None
        self._evaluations: dict[int, dict[str, float]] = {}
        self._path: Path | None = None
        self._unwritten: list[str] = []
        if distributed.is_main():
            path = setting.folder / "metrics.jsonl"
            kept = rows_before(path, setting.first_update)
            path.touch()
            # The rows that stay are the file's beginning: cutting needs no room and no copy.
            os.truncate(path, sum(len(json.dumps(row)) + 1 for row in kept))
            self._note_losses(kept)
            self._path = path
            # An evaluation after `first_update` steps belongs to what is kept.
            for row in rows_before(_evaluations_path(setting.folder), setting.first_update + 1):
                self._evaluations[row.pop("update")] = row
            self._write_evaluations()
        self._seconds = self._interval_seconds = self._waited = 0.0
        device = distributed.device()
        on_gpu = device.type == "cuda"
        self._flops = step_flops(setting.run, setting.micro_batch_size, on_gpu=on_gpu)
        self._peak = peak_of(torch.cuda.get_device_name(device)) if on_gpu else None
        self._mark = time.perf_counter()

    def after_update(self, update: Update) -> Verdict:
        """Keeps the step; at the end of an interval, fetches and writes the interval."""
        now = time.perf_counter()
        self._interval_seconds += now - self._mark
        if self._written or self._pending:
            # The first step also allocates and compiles: no part of the run's speed.
            self._seconds += now - self._mark
            self._waited += update.data_seconds
        self._mark = now
        self._pending.append(update)
        self._total = update.total
        done = update.index + 1
        if done == update.total or done % self._setting.run.runtime.log_every == 0:
            self._flush()
        return PASS

    def on_save(self, index: int) -> Verdict:
        """Before a checkpoint of `index` steps: a resume from it must find all their rows."""
        self._flush()
        return PASS

    def on_evaluation(self, index: int, metrics: dict[str, float]) -> None:
        """Writes the evaluation, together with what is known already of the same step."""
        if self._path is not None:
            self._evaluations.setdefault(index, {}).update(metrics)
            self._write_evaluations()
        # What the evaluation took is not training time.
        self._mark = time.perf_counter()

    def on_end(self, status: str) -> None:
        """Writes what is pending and summary.json."""
        self._flush()
        peak = distributed.max_rank(peak_memory_bytes())
        if self._path is None:
            return
        run, setting = self._setting.run, self._setting
        timed = max(0, self._written - 1)
        images = timed * run.batch.global_batch_size
        first = self._evaluations[min(self._evaluations)] if self._evaluations else {}
        last: dict[str, float] = {}
        for index in sorted(self._evaluations):
            last |= self._evaluations[index]
        with written_or_told(setting.folder / "summary.json"):
            write_json(
                setting.folder / "summary.json",
                {
                    "status": status,
                    "recipe": run.name,
                    "student": run.student.model,
                    "teacher": {"model": run.teacher.model, "source": run.teacher.source}
                    if run.has_teacher
                    else None,
                    "updates": setting.first_update + self._written,
                    "total_updates": self._total,
                    "world_size": setting.world_size,
                    "device": distributed.device().type,
                    "global_batch_size": run.batch.global_batch_size,
                    "micro_batch_size": setting.micro_batch_size,
                    "accumulation": setting.accumulation,
                    "loss_start": self._first_loss,
                    "loss_end": self._last_loss,
                    "held_out_loss_start": first.get("held_out_loss"),
                    "held_out_loss": last.get("held_out_loss"),
                    "held_out_cosine": last.get("held_out_cosine"),
                    "loss_best_constant": last.pop("held_out_best_constant", None),
                    # Whatever else was evaluated, under its own name.
                    **last,
                    "images_per_second": images / self._seconds if images > 0 else None,
                    **shares(
                        self._flops,
                        self._peak,
                        micro_batches=timed * setting.accumulation,
                        seconds=self._seconds,
                    ),
                    "data_wait": self._waited / self._seconds if timed else None,
                    "peak_memory_bytes": peak,
                },
            )

    def _flush(self) -> None:
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        seconds, setting = self._interval_seconds, self._setting
        interval = {
            "images_per_second": len(pending) * setting.run.batch.global_batch_size / seconds,
            **shares(
                self._flops,
                self._peak,
                micro_batches=len(pending) * setting.accumulation,
                seconds=seconds,
            ),
            "data_wait": sum(update.data_seconds for update in pending) / seconds,
            "memory_bytes": peak_memory_bytes(),
        }
        self._interval_seconds = 0.0
        self._written += len(pending)
        if self._path is None:
            return
        rows = [
            {
                "update": update.index,
                "epoch": update.epoch,
                "loss": update.loss,
                "grad_norm": update.grad_norm,
                "learning_rate": update.learning_rate,
                **interval,
                **({"skipped": True} if update.skipped else {}),
            }
            for update in pending
        ]
        self._note_losses(rows)
        self._unwritten += [json.dumps(row) + "\n" for row in rows]
        self._append()
        for call in self._on_rows:
            call(rows)

    def _note_losses(self, rows: Sequence[Row]) -> None:
        """Of the first and the last step that moved the weights."""
        losses = [row["loss"] for row in rows if not row.get("skipped")]
        if losses:
            self._first_loss = losses[0] if self._first_loss is None else self._first_loss
            self._last_loss = losses[-1]

    def _append(self) -> None:
        """Writes whole rows or none: on a full disk they wait for the next interval."""
        assert self._path is not None
        size = self._path.stat().st_size
        try:
            with self._path.open("a") as file:
                file.writelines(self._unwritten)
        except OSError as error:
            os.truncate(self._path, size)
            log.error("%s: %d rows wait: %s", self._path, len(self._unwritten), error)
            return
        self._unwritten = []

    def _write_evaluations(self) -> None:
        path = _evaluations_path(self._setting.folder)
        if not self._evaluations and not path.exists():
            return
        aside = path.with_name(path.name + ".part")
        # All rows each time: what a full disk did not take is written with the next evaluation.
        with written_or_told(path):
            aside.write_text(
                "".join(
                    json.dumps({"update": index, **self._evaluations[index]}) + "\n"
                    for index in sorted(self._evaluations)
                )
            )
            aside.replace(path)


def rows_before(path: Path, update: int) -> list[dict[str, Any]]:
    """Returns the rows of a .jsonl file up to the first one of `update` or later.

    A torn last line and all that follows fall away; an absent file has no rows.
    """
    kept: list[dict[str, Any]] = []
    for line in path.read_text().splitlines(keepends=True) if path.exists() else ():
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            break
        if not line.endswith("\n") or row["update"] >= update:
            break
        kept.append(row)
    return kept


def peak_memory_bytes() -> int:
    """The most memory this rank has held: of its GPU, or of the process where there is none."""
    device = distributed.device()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _evaluations_path(folder: Path) -> Path:
    return folder / "evaluations.jsonl"
