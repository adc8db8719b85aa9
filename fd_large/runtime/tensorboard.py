"""TensorBoard events of a run: the curves of metrics.jsonl and evaluations.jsonl in RUN/events.

A step is the number of finished steps: training rows stand at step + 1, evaluations at the
steps that they followed, as on the progress bar.
"""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from fd_large.runtime.hooks import Row, Setting, Tracker
from fd_large.runtime.run_folder import rows_before

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)

TAGS = {
    "loss": "train/loss",
    "grad_norm": "train/grad_norm",
    "learning_rate": "train/learning_rate",
    "images_per_second": "speed/images_per_second",
    "tflops_per_gpu": "speed/tflops_per_gpu",
    "mfu": "speed/mfu",
    "hardware_utilisation": "speed/hardware_utilisation",
    "data_wait": "speed/data_wait",
    "memory_bytes": "memory/rank_0_peak_bytes",
}


class TensorBoard(Tracker):
    """Writes RUN/events."""

    def on_start(self, setting: Setting) -> None:
        """Opens a file of events that hides what the run will write again."""
        # A second of imports that only rank 0 needs.
        from torch.utils.tensorboard import SummaryWriter

        first = setting.first_update
        # The last step that is kept stands at step `first`.
        self._writer: SummaryWriter | None = SummaryWriter(
            str(setting.folder / "events"), purge_step=first + 1 if first else None, flush_secs=30
        )
        self._sets = [key.split("/")[0] for key in setting.metrics if "/" in key]
        # An evaluation at the seam may come again.
        self._seam = first
        self._at_seam: set[str] = set()
        for row in rows_before(setting.folder / "evaluations.jsonl", first + 1):
            if first and row["update"] == first:
                self._at_seam |= row.keys()

    def on_rows(self, rows: list[Row]) -> None:
        """Writes a point a row."""
        for row in rows:
            for name, tag in TAGS.items():
                if name in row:
                    self._add(tag, row[name], row["update"] + 1)

    def on_evaluation(self, index: int, metrics: dict[str, float]) -> None:
        """Writes a point for each number, under SET/METRIC."""
        for name, value in metrics.items():
            if not (index == self._seam and name in self._at_seam):
                group = next((s for s in self._sets if name.startswith(f"{s}_")), "evaluation")
                self._add(f"{group}/{name.removeprefix(f'{group}_')}", value, index)

    def on_end(self, status: str) -> None:
        """Closes the file."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(OSError):
                writer.close()

    def _add(self, tag: str, value: float, step: int) -> None:
        if self._writer is None:
            return
        try:
            self._writer.add_scalar(tag, value, step)
        except OSError as error:
            # A full disk; the numbers are in metrics.jsonl as soon as there is room.
            log.error("TensorBoard's events end at step %d: %s", step, error)
            self._writer = None
