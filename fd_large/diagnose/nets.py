"""A word of the user's becomes a model to look at, with the loss that its landscape shows."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_large import distributed
from fd_large.backbones.statistics import IMAGENET, Statistics, normalise
from fd_large.checkpoint import stream
from fd_large.engine.checkpoint_models import stored_task
from fd_large.engine.frozen import RANDOM, Named, find_model
from fd_large.engine.job import Job
from fd_large.errors import WeightsError
from fd_large.kernels.whitened_loss import whiten
from fd_large.tasks.jobs import job_of
from fd_large.weights.settle import settle

OBJECTIVE = "the run's own objective"
DRIFT = "change of its own map"
_DRIFT_BETA = 2.0


@dataclass(frozen=True)
class Subject:
    """A model, ready to run.

    Attributes:
        label: Its short name in images.
        source: As the user wrote it.
        model: Normalised images (B, 3, S, S) -> FeatureMap; in evaluation.
        statistics: By which its images are normalised.
        image_size: S, the side of the images that it gets.
        moved: Whose parameters the loss landscape moves.
        loss_words: Which loss that is.
        loss_on: uint8 images -> a function of nothing that gives the loss on them, a scalar, with
            the weights as they then are.
    """

    label: str
    source: str
    net: nn.Module
    statistics: Statistics
    image_size: int
    moved: nn.Module
    loss_words: str
    loss_on: Callable[[Tensor], Callable[[], Tensor]]


def open_subject(source: str) -> Subject:
    """Builds a model with its weights, in float32, on this process's device.

    Args:
        source: See `find_model`; of a run that distils the loss is its own objective. RUN#student is
            the student alone.

    Raises: FDError: if it cannot be had.
    """
    named = find_model(source, job_of)
    job = job_of(named.trained_by) if named.trained_by else None
    if job is None or not job.learns_from_images_alone or named.section.source == RANDOM:
        return _alone(named)
    try:
        return _of_run(named, job)
    except WeightsError as error:
        raise WeightsError(
            f"{error} Or name {source}#student, whose landscape does without the teacher."
        ) from error


def _of_run(named: Named, job: Job) -> Subject:
    """A student with the loss of its training."""
    # Its weights come from the checkpoint; what they started from may be gone.
    run = job.in_one_process()
    run = replace(
        run,
        student=replace(run.student, init=""),
        engine=replace(run.engine, precision="float32"),
    )
    job = job_of(settle(run))
    job.build(bfloat16=False, node_size=1, persistence_threshold=0)
    reader = stream.newest(Path(named.source), where="diagnose")
    task = stored_task(job.make_task, reader, kind=stream.outcome(reader))
    task.to(distributed.device()).eval()

    def loss_on(images: Tensor) -> Callable[[], Tensor]:
        prepared = task.prepare(images, None, None)
        return lambda: task(**prepared)[0]

    return Subject(
        label=named.label,
        source=named.source,
        net=task.student,
        statistics=IMAGENET,
        image_size=named.image_size,
        moved=task,
        loss_words=OBJECTIVE,
        loss_on=loss_on,
    )


def _alone(named: Named) -> Subject:
    """A model without an objective: its loss is how far its own map moves."""
    net, statistics = named.build()
    net.eval()

    def loss_on(images: Tensor) -> Callable[[], Tensor]:
        pixels = normalise(images, statistics)
        with torch.no_grad():
            start = whiten(net(pixels).tokens)
        return lambda: F.smooth_l1_loss(whiten(net(pixels).tokens), start, beta=_DRIFT_BETA)

    return Subject(
        label=named.label,
        source=named.source,
        net=net,
        statistics=statistics,
        image_size=named.image_size,
        moved=net,
        loss_words=DRIFT,
        loss_on=loss_on,
    )
