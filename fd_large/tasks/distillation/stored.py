"""What a stored distillation is asked for: its export, its heads, its loss, its model card."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from fd_large.checkpoint import stream
from fd_large.checkpoint.read import Reader
from fd_large.checkpoint.stream import Shape
from fd_large.engine.checkpoint_models import fill_stored
from fd_large.errors import FDError
from fd_large.tasks.distillation.job import DistillationJob
from fd_large.tasks.distillation.model_card import learned
from fd_large.tasks.distillation.several.running_statistics import RUNNING
from fd_large.tasks.distillation.stored_heads import (
    StoredHead,
    fill_heads,
    projection_shapes,
    read_heads,
    write,
)
from fd_large.tasks.distillation.stored_teachers import facts_by_teacher
from fd_large.tasks.stored_run import StoredRun
from fd_large.weights.libraries import To
from fd_large.weights.model_card import Learned

log = logging.getLogger(__name__)


class StoredDistillation(StoredRun):
    """A distilled student, with a head for each target that it learnt."""

    job: DistillationJob
    loss_name = "the run's own objective"

    def exported_beside(
        self, reader: Reader, student: Mapping[str, Shape], to: To
    ) -> Mapping[str, Shape]:
        """Returns the projection if the library's files hold it.

        The whole task is checked, whatever part of it goes out, but for a head of the user's own,
        whose code may not be allowed.
        """
        if self.run.teachers or self.run.objective.head != "linear":
            stream.check(reader, dict(student), prefix=stream.STUDENT)
            return {}
        is_running = self.run.objective.normaliser in RUNNING
        projection = projection_shapes(reader, student, is_running=is_running)
        return projection if to == "fd" else {}

    def learned(self, manifest: Mapping[str, Any], to: To) -> Learned:
        """Returns what the model card says of teachers, losses and crops."""
        facts = facts_by_teacher(manifest, several=bool(self.run.teachers))
        return learned(self.run.taught_by, facts, self.run.data)

    def heads(self, reader: Reader) -> Mapping[str, StoredHead]:
        """Returns the heads of a checkpoint by their targets' labels; "teacher" for the only one.

        Only they have memory; of all else the shapes are compared with the checkpoint's.

        Args:
            reader: The checkpoint.
        """
        job = self.job
        with torch.device("meta"):
            teachers = job.make_teachers()
            task = job.task_around(teachers)
        return fill_heads(
            task,
            teachers,
            job.settled.taught_by,
            image_size=self.run.data.image_size,
            fill=lambda: fill_stored(task, reader, kind=stream.outcome(reader)),
        )

    def export_heads(self, reader: Reader, folder: Path, shard_size: int) -> None:
        """Writes the heads of all teachers, where the models beside them can be made again."""
        try:
            heads = self.heads(reader)
        except FDError as error:
            log.warning("export: the heads are left out, the student is whole: %s", error)
            return
        write(heads, folder, task=self.run.task.name, shard_size=shard_size)

    exported_heads = staticmethod(read_heads)
