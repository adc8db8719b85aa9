"""Tracker that writes the curves of a run as TensorBoard events to RUN/events."""

from __future__ import annotations

import logging
from contextlib import suppress
from typing import TYPE_CHECKING

from fd_large.recipes.file_names import EVENTS
from fd_large.runtime.curves import Curves
from fd_large.runtime.hooks import Setting

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger(__name__)


class TensorBoard(Curves):
    """Tracker that writes curves as TensorBoard events; after an error it writes nothing more."""

    def on_start(self, setting: Setting) -> None:
        """Opens a file of events; older points that the run will write again are hidden."""
        # A second of imports that only rank 0 needs.
        from torch.utils.tensorboard import SummaryWriter

        super().on_start(setting)
        first = setting.first_update
        # The last step that is kept is drawn at `first`.
        self._writer: SummaryWriter | None = SummaryWriter(
            str(setting.folder / EVENTS), purge_step=first + 1 if first else None, flush_secs=30
        )

    def on_end(self, status: str) -> None:
        """Closes the file of events."""
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(OSError):
                writer.close()

    def add(self, values: dict[str, float], step: int) -> None:
        """Writes one point for each curve that `values` names; does nothing after a failed write.

        Args:
            values: {name of a curve: value of the point}.
            step: Number of finished steps, the x coordinate of the points.
        """
        if self._writer is None:
            return
        try:
            for tag, value in values.items():
                self._writer.add_scalar(tag, value, step)
        except OSError as error:
            # A full disk; the numbers are in metrics.jsonl as soon as there is room.
            log.error("TensorBoard's events end at step %d: %s", step, error)
            self._writer = None
