"""What a recipe says of a linear probe, and what others may know of it without torch."""

from __future__ import annotations

from dataclasses import dataclass

from fd_large.recipes.fields import at_least, check_types, statistics_or_none
from fd_large.recipes.task_kind import OF_VIEWS_WITHOUT_LABELS, TaskKind
from fd_large.tasks.classification.section import METRICS


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """One linear layer on a frozen model; data.root holds labelled train/, val/ or test/."""

    # Number of neighbouring images of a global batch that share the statistics of the batch norm,
    # as the images of a GPU do in the official code. It divides the global batch, or is larger.
    norm_batch: int = 128
    # Mean and standard deviation of red, green and blue with which images are normalised, in
    # training and in tests: six numbers for pixel values in 0..1. Empty uses those that the
    # student's weights were trained with, else ImageNet's.
    statistics: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_types(self, "task.linear")
        at_least("task.linear.norm_batch", self.norm_batch, 2, "images")
        statistics_or_none("task.linear.statistics", self.statistics)


KIND = TaskKind(
    name="linear",
    folder="linear",
    job="linear.job.LinearProbeJob",
    stored="classification.stored.StoredClassification",
    transfer="classification.transfer.LinearTransfer",
    title="Linear probe",
    section=LinearProbe,
    trains_models=True,
    ignored_fields=OF_VIEWS_WITHOUT_LABELS,
    metrics=lambda _: METRICS,
)
