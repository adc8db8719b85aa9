"""The numbers of a run: a line in metrics.jsonl for every update, a line of log per interval.

Losses stay on the device until a log step, where one all-reduce and one read fetch all of them.
"""

from __future__ import annotations

import json
import logging
import time
from typing import IO

import torch
from torch import Tensor

from fd_large import distributed
from fd_large.runtime.hooks import NOTHING, Hook, Request, Setting, Update
from fd_large.runtime.run_folder import write_json

log = logging.getLogger(__name__)


class Meter(Hook):
    """Writes metrics.jsonl and summary.json on rank 0."""

    def on_start(self, setting: Setting) -> None:
        """Opens metrics.jsonl, without the lines that the run will write again."""
        self._setting = setting
        self._pending: list[Update] = []
        self._written = 0
        self._first_loss: float | None = None
        self._last_loss: float | None = None
        self._file: IO[str] | None = None
        if distributed.is_main():
            path = setting.folder / "metrics.jsonl"
            kept = _lines_before(path.read_text() if path.exists() else "", setting.first_update)
            path.write_text("".join(kept))
            if kept:
                self._first_loss = json.loads(kept[0])["loss"]
                self._last_loss = json.loads(kept[-1])["loss"]
            self._file = path.open("a")
        self._start = self._interval_start = time.perf_counter()

    def after_update(self, update: Update) -> Request:
        """Keeps the update; at the end of an interval, fetches and writes the interval."""
        self._pending.append(update)
        last = update.index + 1 == self._setting.total_updates
        if last or (update.index + 1) % self._setting.run.runtime.log_every == 0:
            self._flush()
        return NOTHING

    def on_end(self, status: str) -> None:
        """Writes what is pending and summary.json."""
        self._flush()
        if self._file is None:
            return
        self._file.close()
        run, setting = self._setting.run, self._setting
        seconds = time.perf_counter() - self._start
        images = self._written * run.batch.global_batch_size
        write_json(
            setting.folder / "summary.json",
            {
                "status": status,
                "recipe": run.name,
                "student": run.student.model,
                "teacher": {"model": run.teacher.model, "source": run.teacher.source},
                "updates": setting.first_update + self._written,
                "total_updates": setting.total_updates,
                "world_size": setting.world_size,
                "global_batch_size": run.batch.global_batch_size,
                "micro_batch_size": setting.micro_batch_size,
                "accumulation": setting.accumulation,
                "loss_start": self._first_loss,
                "loss_end": self._last_loss,
                "images_per_second": images / seconds if self._written else None,
                "peak_memory_bytes": peak_memory_bytes(),
            },
        )

    def _flush(self) -> None:
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        losses = distributed.mean(torch.stack([update.loss for update in pending])).tolist()
        norms = torch.stack([_scalar(update.grad_norm) for update in pending]).tolist()
        now = time.perf_counter()
        per_second = (
            len(pending) * self._setting.run.batch.global_batch_size / (now - self._interval_start)
        )
        self._interval_start = now
        self._written += len(pending)
        if self._file is None:
            return
        if self._first_loss is None:
            self._first_loss = losses[0]
        self._last_loss = losses[-1]
        for update, loss, norm in zip(pending, losses, norms, strict=True):
            row = {
                "update": update.index,
                "epoch": update.epoch,
                "loss": loss,
                "grad_norm": norm,
                "learning_rate": update.learning_rate,
                "images_per_second": per_second,
            }
            self._file.write(json.dumps(row) + "\n")
        self._file.flush()
        log.info(
            "update %d/%d  epoch %d  loss %.5f  grad norm %.3f  rate %.3g  %.1f images/s",
            pending[-1].index + 1,
            self._setting.total_updates,
            pending[-1].epoch,
            losses[-1],
            norms[-1],
            pending[-1].learning_rate,
            per_second,
        )


def peak_memory_bytes() -> int:
    """The most memory this rank has held: of its GPU, or of the process where there is none."""
    device = distributed.device()
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def _scalar(value: Tensor | float) -> Tensor:
    return torch.as_tensor(value, dtype=torch.float32).detach().reshape(()).cpu()


def _lines_before(text: str, update: int) -> list[str]:
    """Whole lines of updates before `update`; a torn last line and what will be redone fall away."""
    kept = []
    for line in text.splitlines(keepends=True):
        if not line.endswith("\n") or json.loads(line)["update"] >= update:
            break
        kept.append(line)
    return kept
