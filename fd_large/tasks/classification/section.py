"""The sections and `TaskKind`s of fine-tuning and linear probe; this file does not import torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from fd_large.recipes.fields import (
    at_least,
    check_types,
    not_negative,
    statistics_or_none,
    within,
)
from fd_large.recipes.task_kind import OF_VIEWS_WITHOUT_LABELS, TaskKind

METRICS = {
    "loss": "cross-entropy",
    "test/loss": "test loss",
    "test/top1": "test top-1 accuracy (%)",
    "test/top5": "test top-5 accuracy (%)",
}
"""Labels of the metrics by name; see `TrainingJob.metrics`."""


@dataclass(frozen=True, kw_only=True)
class FineTune:
    """Settings of fine-tuning, a classification in which the whole model is trained.

    The folder data.root has labelled images in train/, and in val/ or test/.
    """

    # Classifier of the mean of the tokens. linear: one linear layer. A module of your own, made
    # from (width, number of classes): module:FILE.py:NAME (docs/extending.md).
    head: str = "linear"
    # Mean magnitude of RandAugment, which applies up to two operations to an image, in [0, 10]. 0
    # turns RandAugment off.
    randaugment: float = 9.0
    # Standard deviation of the magnitude of RandAugment's operations, 0 or more.
    randaugment_std: float = 0.5
    # Probability that a box of 2% to 33% of an image is filled with noise (random erasing),
    # in [0, 1]. 0 turns this off.
    erasing: float = 0.25
    # Alpha of the beta distribution of mixup's weights, in [0, 2]. 0 turns mixup off.
    mixup: float = 0.8
    # Alpha of the beta distribution of CutMix's areas, in [0, 2]. 0 turns CutMix off.
    cutmix: float = 1.0
    # Probability that a global batch gets CutMix rather than mixup, if both are on, in [0, 1].
    switch_probability: float = 0.5
    # Label smoothing: the probability that is taken from the true class and spread over all
    # classes, in [0, 1]. 0 turns it off.
    smoothing: float = 0.1
    # Mean and standard deviation of red, green and blue with which images are normalised, in
    # training and in tests: six numbers for pixel values in 0..1. Empty: the statistics with which
    # the student's weights were trained, or, if they are unknown, ImageNet's.
    statistics: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_types(self, "task.finetune")
        not_negative("task.finetune.randaugment_std", self.randaugment_std)
        within("task.finetune.randaugment", self.randaugment, "[0, 10]")
        for name in ("mixup", "cutmix"):
            within(f"task.finetune.{name}", getattr(self, name), "[0, 2]")
        for name in ("erasing", "switch_probability", "smoothing"):
            within(f"task.finetune.{name}", getattr(self, name), "[0, 1]")
        statistics_or_none("task.finetune.statistics", self.statistics)


@dataclass(frozen=True, kw_only=True)
class LinearProbe:
    """Settings of the linear probe, a classification by a linear layer on a frozen model.

    The folder data.root has labelled images in train/, and in val/ or test/.
    """

    # Feature that is classified. mean: the mean of the patch tokens, as in the official code. cls:
    # the class token. both: the mean and the class token, concatenated.
    pool: Literal["mean", "cls", "both"] = "mean"
    # Number of neighbouring images of a global batch that share the statistics of the batch norm
    # before the linear layer, as the images of a GPU do in the official code. The number divides
    # the global batch size; a larger number counts as the global batch size.
    norm_batch: int = 128
    # Mean and standard deviation of red, green and blue with which images are normalised, in
    # training and in tests: six numbers for pixel values in 0..1. Empty: the statistics with which
    # the student's weights were trained, or, if they are unknown, ImageNet's.
    statistics: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        check_types(self, "task.linear")
        at_least("task.linear.norm_batch", self.norm_batch, 2, "images")
        statistics_or_none("task.linear.statistics", self.statistics)


FINETUNE = TaskKind(
    name="finetune",
    folder="classification",
    job="classification.job.FineTuningJob",
    stored="classification.stored.StoredClassification",
    transfer="classification.transfer.ClassificationTransfer",
    title="Fine-tuning",
    section=FineTune,
    trains_models=True,
    ignored_fields=OF_VIEWS_WITHOUT_LABELS,
    metrics=lambda _: METRICS,
    next_steps=(
        (
            "its features by k-NN, without the classifier",
            (
                *("evaluate", "{run}", "--task", "knn", "--data.root", "{data.root}"),
                *("--out", "{run}/evaluation"),
            ),
        ),
        ("the model for other programs", ("export", "{run}", "{run}/export", "--to", "{library}")),
    ),
)

LINEAR = TaskKind(
    name="linear",
    folder="classification",
    job="classification.job.LinearProbeJob",
    stored="classification.stored.StoredClassification",
    transfer="classification.transfer.LinearTransfer",
    title="Linear probe",
    section=LinearProbe,
    trains_models=True,
    ignored_fields=OF_VIEWS_WITHOUT_LABELS,
    metrics=lambda _: METRICS,
)
