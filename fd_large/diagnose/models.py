"""A model that the user names, with its weights and the loss that its landscape shows."""

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
from fd_large.engine.find_model import NamedModel, find_model
from fd_large.engine.job import Job
from fd_large.errors import WeightsError
from fd_large.recipes.sections import RANDOM
from fd_large.tasks.jobs import job_of

OBJECTIVE = "the run's own objective"
DRIFT = "change of its own map"
_DRIFT_BETA, _EPS = 2.0, 1e-5


@dataclass(frozen=True)
class LoadedModel:
    """A model, ready to run.

    Attributes:
        label: Its short name in tables and plots.
        source: The user's name for it.
        backbone: Normalised images (B, 3, S, S) -> FeatureMap; in evaluation.
        statistics: The normalisation of its images.
        image_size: S, the side of its images, in pixels.
        trained: The module whose parameters the loss landscape moves.
        loss_name: The loss of the landscape in words.
        loss_on: uint8 images -> a function without arguments that returns the loss on them, a
            scalar, with the weights as they are when it is called.
    """

    label: str
    source: str
    backbone: nn.Module
    statistics: Statistics
    image_size: int
    trained: nn.Module
    loss_name: str
    loss_on: Callable[[Tensor], Callable[[], Tensor]]


def load_model(source: str) -> LoadedModel:
    """Builds a model with its weights, in float32, on this process's device.

    Args:
        source: See `find_model`. The loss of a run that distils is its own objective; RUN#student
            is the student alone.

    Raises: FDError: if it cannot be loaded.
    """
    named = find_model(source, job_of)
    job = named.trained_by
    if job is None or not job.learns_from_images_alone or named.section.source == RANDOM:
        return _alone(named)
    try:
        return _of_run(named, job)
    except WeightsError as error:
        raise WeightsError(
            f"{error} Or name {source}#student, whose landscape does without the teacher."
        ) from error


def _of_run(named: NamedModel, job: Job) -> LoadedModel:
    """A student with the loss that it was trained by."""
    # Its weights come from the checkpoint; what they started from may be gone.
    run = job.in_one_process()
    run = replace(
        run,
        student=replace(run.student, init=""),
        engine=replace(run.engine, precision="float32"),
    )
    job = job_of(job_of(run).settle(named.weights))
    job.weights = named.weights
    job.build(bfloat16=False, node_size=1, persistence_threshold=0)
    reader = stream.newest(Path(named.source), where="diagnose")
    task = stored_task(job.make_task, reader, kind=stream.outcome(reader))
    task.to(distributed.device()).eval()

    def loss_on(images: Tensor) -> Callable[[], Tensor]:
        prepared = task.prepare(images, None, None)
        return lambda: task(**prepared)[0]

    return LoadedModel(
        label=named.label,
        source=named.source,
        backbone=task.student,
        statistics=IMAGENET,
        image_size=named.image_size,
        trained=task,
        loss_name=OBJECTIVE,
        loss_on=loss_on,
    )


def _alone(named: NamedModel) -> LoadedModel:
    """A model without an objective; its loss is how far its own map moves.

    Each channel is measured by its own deviation over tokens and images. A norm of each token, as
    in training, would divide by a channel that is large and hardly varies, of which CLIP has some,
    and make the same change of all others look small.
    """
    backbone, statistics = named.build()
    backbone.eval()

    def loss_on(images: Tensor) -> Callable[[], Tensor]:
        pixels = normalise(images, statistics)
        with torch.no_grad():
            start = backbone(pixels).tokens.float()
            variance = start.var((0, 1), correction=0)
            # A channel that never varies counts as little as its share of the map.
            scale = (variance + _EPS * variance.mean()).rsqrt()
        return lambda: F.smooth_l1_loss(
            backbone(pixels).tokens.float() * scale, start * scale, beta=_DRIFT_BETA
        )

    return LoadedModel(
        label=named.label,
        source=named.source,
        backbone=backbone,
        statistics=statistics,
        image_size=named.image_size,
        trained=backbone,
        loss_name=DRIFT,
        loss_on=loss_on,
    )
