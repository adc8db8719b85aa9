"""Loads the models of a diagnosis, with the losses whose landscapes are computed."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.backbones.statistics import Statistics, normalise
from fd_large.checkpoint import stream
from fd_large.engine.checkpoint_models import stored_task
from fd_large.engine.find_model import NamedModel, find_model
from fd_large.engine.task import Task
from fd_large.errors import DataError, FDError, WeightsError
from fd_large.evaluation.diagnosis.sample import Sample
from fd_large.ranks import distributed
from fd_large.recipes.sections import RANDOM
from fd_large.tasks.jobs import job_of, stored_run_of
from fd_large.tasks.stored_run import StoredRun

log = logging.getLogger(__name__)

DRIFT = "change of its own map"
_DRIFT_BETA, _EPS = 2.0, 1e-5
# Names of parameters and modules, of this project's models and of others.
_RELATIVE = re.compile(r"rel_pos|relative_position|position_bias|cpb_mlp|rope|rotary")
_ABSOLUTE = re.compile(r"pos_embed|position_embedding")

Measure = Callable[[], Mapping[str, float]]
"""Function that returns {description: value} for a module's present weights, the loss first."""


@dataclass(frozen=True)
class Loss:
    """Loss whose landscape is computed around a model's weights.

    Attributes:
        comparable: Key that comparable losses of several models share; their plots have the same
            scale.
        module: The module whose parameters are moved.
        on: Function of images (B, 3, S, S) uint8 and their indices in the dataset; it returns a
            function that computes the loss on these images.
    """

    comparable: str
    module: nn.Module
    on: Callable[[Tensor, Sequence[int]], Measure]


@dataclass(frozen=True)
class LoadedModel:
    """Model of a diagnosis, ready to run.

    Attributes:
        label: Short name in tables and plots.
        source: The user's name for the model.
        backbone: The model in evaluation mode, from normalised images (B, 3, S, S) to a FeatureMap.
        statistics: The normalisation of the model's images.
        image_size: S, the side of the model's images in pixels.
        positions: Kinds of the model's position encodings, as text: "absolute", "relative",
            "absolute and relative" or "none".
        is_supervised: Whether the model is the student of a run that trained on labels or boxes,
            from random weights.
        losses: The training loss of the model's run, if there is a run and its loss can be
            computed; and the drift loss, which is the change of the model's own map.
        left_out: Reason why the training loss is left out; "" if it is included or there is none.
        scratch: The same model with random weights, or None if the model itself has random weights
            or is made by the user's own code.
    """

    label: str
    source: str
    backbone: nn.Module
    statistics: Statistics
    image_size: int
    positions: str
    is_supervised: bool
    losses: tuple[Loss, ...]
    left_out: str
    scratch: NamedModel | None


def load_model(source: str, sample: Sample) -> LoadedModel:
    """Loads a model with its weights, in float32, on this process's device.

    The training loss of the model's run is included if the run's task has a loss
    (`StoredRun.loss_name`), and the images have the classes that the loss needs.

    Args:
        source: The user's name for the model: a run's folder (the student), RUN#teacher,
            RUN#scratch, weights, or MODEL=SOURCE (`engine.find_model.find_model`).
        sample: The images.

    Raises: FDError: if the model cannot be loaded.
    """
    named = find_model(source, job_of)
    job = named.trained_by
    stored = stored_run_of(job) if job is not None else None
    is_random = named.section.source == RANDOM
    task, losses, left_out = None, [], ""
    if stored is not None and stored.loss_name and not is_random:
        try:
            with _of_recipe(named):
                task, loss = _of_task(named, stored, sample)
            losses.append(loss)
        except (DataError, WeightsError) as error:  # A dataset or weights of the run may be gone.
            left_out = f"{stored.loss_name} is left out: {error}"
            log.warning("%s: %s", named.label, left_out)
    if task is not None and job is not None and not (student := job.stored_student()).absent:
        backbone, statistics = task.student, student.statistics
    else:
        backbone, statistics = named.build()
    backbone.eval()
    random = replace(named, section=replace(named.section, source=RANDOM, allow=()))
    return LoadedModel(
        label=named.label,
        source=named.source,
        backbone=backbone,
        statistics=statistics,
        image_size=named.image_size,
        positions=_positions(backbone),
        # A student that began from other weights has also learnt from their pre-training.
        is_supervised=job is not None
        and not is_random
        and not job.learns_from_images_alone
        and not job.run.student.init,
        losses=(*losses, _drift(backbone, statistics)),
        left_out=left_out,
        scratch=None if is_random or named.architecture.code else random,
    )


@contextmanager
def _of_recipe(named: NamedModel) -> Iterator[None]:
    """Names the run in messages about a flag, for errors that the block raises.

    A message that begins with a flag of `train` would mislead, since the run's recipe sets this
    field, and not the user.

    Args:
        named: The model, whose run is named.
    """
    try:
        yield
    except FDError as error:
        if not str(error).startswith("--"):
            raise
        raise type(error)(f"{named.source}, its {str(error).removeprefix('--')}") from error


def trained_task(named: NamedModel, stored: StoredRun, *, where: str) -> tuple[Task, StoredRun]:
    """Builds the task of a student's run with the checkpoint's weights, in evaluation mode.

    Args:
        named: The student.
        stored: The student's run.
        where: The command, for messages.

    Returns: the task, and the run in the settings in which the task was built (one process,
        float32).
    """
    # The weights come from the checkpoint; the student's initial weights may be gone.
    run = stored.run.in_one_process()
    run = replace(
        run,
        student=replace(run.student, init=""),
        engine=replace(run.engine, precision="float32"),
    )
    job = job_of(job_of(run).settle(named.weights))
    job.weights = named.weights
    job.build(bfloat16=False, node_size=1, persistence_threshold=0)
    assert named.checkpoint is not None  # It is a run's student.
    reader = stream.newest(named.checkpoint, where=where)
    task = stored_task(job.make_task, reader, kind=stream.outcome(reader))
    return task.to(distributed.device()).eval(), stored_run_of(job)


def _of_task(named: NamedModel, stored: StoredRun, sample: Sample) -> tuple[Task, Loss]:
    """Returns the task of a student's run, with trained weights, and the run's training loss.

    Args:
        named: The student.
        stored: The student's run.
        sample: The images, whose classes a loss on labels needs.

    Raises: FDError: if the images lack the classes of the loss, or weights are missing.
    """
    task, stored = trained_task(named, stored, where="diagnose")
    classes = stored.classes()
    known = None if classes is None else torch.from_numpy(sample.labels(classes))

    def on(images: Tensor, numbers: Sequence[int]) -> Measure:
        labels = None if known is None else known[list(numbers)].to(images.device)
        return stored.losses_on(task, images, labels)

    # Losses of several runs can be compared only if they are losses on labels: the maps of a run's
    # teacher are its own.
    comparable = named.source
    if classes is not None:
        comparable = f"{stored.loss_name} {sha256(repr(classes).encode()).hexdigest()[:16]}"
    return task, Loss(comparable, task, on)


def _drift(backbone: nn.Module, statistics: Statistics) -> Loss:
    """Returns the drift loss, which compares a model's map with the map at its trained weights.

    Every model has this loss. Each channel is divided by its standard deviation over tokens and
    images. Normalising each token, as in training, would let large but nearly constant channels
    dominate, as in CLIP, so that equal changes of the other channels would look small.
    """

    def on(images: Tensor, numbers: Sequence[int]) -> Measure:
        pixels = normalise(images, statistics)
        with torch.no_grad():
            start = backbone(pixels).tokens.float()
            variance = start.var((0, 1), correction=0)
            # A channel that never varies counts as little as its share of the map.
            scale = (variance + _EPS * variance.mean()).rsqrt()

        def measure() -> dict[str, float]:
            moved = backbone(pixels).tokens.float()
            return {DRIFT: F.smooth_l1_loss(moved * scale, start * scale, beta=_DRIFT_BETA).item()}

        return measure

    return Loss(DRIFT, backbone, on)


def _positions(backbone: nn.Module) -> str:
    """Returns the kinds of the position encodings of `backbone`.

    The result is "absolute", "relative", "absolute and relative" or "none". The kinds are
    recognised by the names of parameters and modules.
    """
    parts = [name for name, _ in backbone.named_parameters()]
    parts += [name for name, _ in backbone.named_modules()]
    kinds = {
        kind
        for kind, pattern in (("absolute", _ABSOLUTE), ("relative", _RELATIVE))
        if any(pattern.search(part) for part in parts)
    }
    return " and ".join(sorted(kinds)) or "none"
