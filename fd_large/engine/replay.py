"""Runs a step that the guard refused again: one process, one device, plain torch.

Weights come from a checkpoint, whatever ranks and ZeRO stage wrote it; images from the incident;
drop path is drawn again from seed, epoch and positions. So the losses are the recorded ones if the
checkpoint holds the weights that the step ran on.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from fd_large import files
from fd_large.checkpoint import store
from fd_large.checkpoint.read import Reader
from fd_large.data.loader import Batch
from fd_large.engine.block_wrappers import checkpoint_blocks
from fd_large.engine.checkpoint_models import sources_of, stored_task
from fd_large.engine.forward_backward import arguments_of_step
from fd_large.engine.incident_evidence import layer_maxima
from fd_large.engine.job import Job, JobOf
from fd_large.engine.task import Task
from fd_large.engine.zero import partition
from fd_large.engine.zero.config import computes_in_bfloat16
from fd_large.errors import CheckpointError, ConfigError
from fd_large.files import kind_of
from fd_large.ranks import distributed
from fd_large.recipes.file_names import DEEPSPEED, INCIDENT, INCIDENTS, METRICS, RECIPE, STEP
from fd_large.runtime.guard import INCIDENTS_WITH_IMAGES, roll_backs_of
from fd_large.runtime.run_folder import rows_before

log = logging.getLogger(__name__)


class RankImages(NamedTuple):
    """One rank's images of the step.

    Attributes:
        rank: The rank, from 0.
        images: (b, 3, H, W) uint8, micro batch by micro batch.
        positions: (B,) int64, their places in the epoch's order.
        losses: The recorded loss of each micro batch.
    """

    rank: int
    images: list[Tensor]
    positions: Tensor
    losses: list[float]


class Incident(NamedTuple):
    """A refused step, read from its folder.

    Attributes:
        folder: The run's folder.
        job: The run's job, in the precision that it had, with nothing split over ranks.
        said: The content of incident.json.
        images: The images of the ranks that keep theirs.
    """

    folder: Path
    job: Job
    said: dict[str, Any]
    images: list[RankImages]


class Weights(NamedTuple):
    """The weights that the step is run on.

    Attributes:
        reader: The checkpoint.
        update: Its number of finished steps.
        accepted_between: Number of steps that moved the weights of one of the two, step and
            checkpoint, and not the other; 0: they are those of the step. None: the checkpoint is
            later than the step.
    """

    reader: Reader
    update: int
    accepted_between: int | None


class Replayed(NamedTuple):
    """The numbers of the step run again.

    Attributes:
        losses: Rank -> loss of each micro batch.
        grad_norm: L2 norm of the gradient of the mean loss over all replayed images.
        forward: Layer -> largest magnitude of its output, in execution order.
        gradient: Layer -> largest magnitude of the gradient at its output.
        other_training: Why the checkpoint belongs to another training (`Job.check_stored`); empty:
            it does not.
    """

    losses: dict[int, list[float]]
    grad_norm: float
    forward: dict[str, float]
    gradient: dict[str, float]
    other_training: str


def read_incident(path: Path, job_of: JobOf) -> Incident:
    """Reads an incident where the run wrote it.

    Args:
        path: incident.json, or the folder that holds it.
        job_of: Makes the job of the run's recipe.

    Raises: ConfigError: if there is no incident, or it is damaged, outside of its run, or without
        images.
    """
    file = path / INCIDENT if kind_of(path) == "folder" else path
    if kind_of(file) != "file":
        raise ConfigError(
            f"replay: {path}: no incident; got no such file, expected RUN/{INCIDENTS}/"
            f"{STEP}NNNNNNNN/{INCIDENT}. Name one that the guard has written."
        )
    said = _object(file)
    folder = file.absolute().parents[2]
    if kind_of(folder / RECIPE) != "file":
        raise ConfigError(
            f"replay: {file}: outside of its run; got no {RECIPE} in {folder}, expected the "
            "folder of a run. Put the incident back into RUN/incidents."
        )
    images = []
    try:
        _check(said)
        for name in said["images"]:
            if kind_of(file.parent / name) == "file":
                stored = load_file(file.parent / name)
                rank = int(name.split(".")[0].removeprefix("rank_"))
                recorded = said["ranks"][rank]
                counts = {len(recorded["names"]), len(stored["positions"]), len(stored["images"])}
                if len(counts) > 1:
                    raise ValueError(f"{name}: {counts} images")
                parts = list(stored["images"].split(said["micro_batch_size"]))
                if "sizes" in stored:  # Files of older versions have one size.
                    sizes = zip(parts, stored["sizes"].tolist(), strict=True)
                    parts = [part[..., :height, :width] for part, (height, width) in sizes]
                images.append(RankImages(rank, parts, stored["positions"], recorded["losses"]))
        if not images:
            raise ConfigError(
                f"replay: {file}: its images are gone; got none, expected those of a rank. The "
                f"newest {INCIDENTS_WITH_IMAGES} incidents keep theirs: replay one of them."
            )
        return Incident(folder, _job(folder, job_of), said, images)
    except (KeyError, IndexError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise ConfigError(
            f"replay: {file}: damaged; got {type(error).__name__} {error}, expected what the guard "
            "wrote. Replay another incident."
        ) from error


def find_weights(incident: Incident) -> Weights:
    """Finds the newest sound checkpoint from before the step, else the oldest from after it.

    Raises: CheckpointError: if no checkpoint of the run is sound.
    """
    step = incident.said["index"]
    stored = store.complete(incident.folder)
    before = [item for item in stored if item.update <= step]
    complaint = "none"
    for item in (*reversed(before), *stored[len(before) :]):
        if problems := store.verify(item, {"master"}):
            complaint = f"{item.path.name}: {problems[0]}"
            log.error("DAMAGED CHECKPOINT, skipped: %s", complaint)
            continue
        reader = Reader(item, {"master"})
        if item.update > step:
            return Weights(reader, item.update, None)
        rows = rows_before(incident.folder / METRICS, step)
        roll_backs = roll_backs_of(incident.folder / INCIDENTS)
        apart = _moved_by(rows, roll_backs, step) ^ _moved_by(rows, roll_backs, item.update)
        return Weights(reader, item.update, len(apart))
    raise CheckpointError(
        f"replay: {store.checkpoints_of(incident.folder)}: no sound checkpoint; got {complaint}, "
        "expected one of the run's. Restore one, the newest before the incident if there is any."
    )


def run_again(incident: Incident, weights: Weights) -> Replayed:
    """Runs forward and backward over the incident's images, micro batch by micro batch.

    Raises: WeightsError: if a weights file that the task needs is gone; CheckpointError: if the
        checkpoint is not of the recipe's model.
    """
    job, said, reader = incident.job, incident.said, weights.reader
    bfloat16 = computes_in_bfloat16(job.run.engine.precision)
    job.build(bfloat16=bfloat16, node_size=1, persistence_threshold=0)
    task = _task(job, reader, bfloat16=bfloat16)
    trained = {name: p for name, p in task.named_parameters() if p.requires_grad}
    sums = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in trained.items()}
    losses: dict[int, list[float]] = {own.rank: [] for own in incident.images}
    count = sum(len(own.losses) for own in incident.images)
    size = said["micro_batch_size"]
    gradient: dict[str, Tensor] = {}
    batches = [
        Batch(images, said["epoch"], positions, positions)
        for own in incident.images
        for images, positions in zip(own.images, own.positions.split(size), strict=True)
    ]
    ranks = [own.rank for own in incident.images for _ in own.images]
    with layer_maxima(task, gradient) as forward:
        # One process has the micro batches of all ranks.
        arguments = arguments_of_step(task, task, batches, job.run.runtime.seed, count=count)
        for rank, each in zip(ranks, arguments, strict=True):
            loss, _ = task(**each)
            (loss / count).backward()
            losses[rank].append(loss.item())
            for name, parameter in trained.items():
                if parameter.grad is not None:
                    sums[name] += parameter.grad
                    parameter.grad = None
    try:
        job.check_stored(reader.manifest)
        other_training = ""
    except CheckpointError as error:
        other_training = str(error)
    return Replayed(
        losses,
        torch.stack([value.norm() for value in sums.values()]).norm().item(),
        {name: value.item() for name, value in forward.items()},
        {name: value.item() for name, value in gradient.items()},
        other_training,
    )


def _moved_by(
    rows: Sequence[Mapping[str, Any]], roll_backs: Mapping[int, int], steps: int
) -> set[int]:
    """Returns which of the first `steps` steps the weights after them descend from."""
    last = max((step for step in roll_backs if step < steps), default=None)
    kept, start = set(), 0
    if last is not None:
        kept, start = _moved_by(rows, roll_backs, min(roll_backs[last], last)), last + 1
    between = (row for row in rows if start <= row["update"] < steps)
    return kept | {row["update"] for row in between if not row.get("skipped")}


def _task(job: Job, reader: Reader, *, bfloat16: bool) -> Task:
    student, task = job.run.student, stored_task(job.make_task, reader, kind="master")
    if bfloat16:
        partition.to_bfloat16(task)
    task.to(distributed.device()).train()
    if student.activation_checkpointing != "off":
        # Offloading the inputs would make no difference to the numbers.
        checkpoint_blocks(task.student.blocks(), mode="every", every=student.checkpoint_every)
    return task


def _job(folder: Path, job_of: JobOf) -> Job:
    job = job_of(_object(folder / RECIPE))
    if not job.learns_from_images_alone:
        raise ConfigError(
            f"replay: {folder}: its incidents do not hold what the task learns from; got the task "
            f"{job.run.task.name}, expected one that learns from images alone. Look at the layers "
            "that the incident names."
        )
    run = job.run.in_one_process()
    # In the run's own precision, wherever it is replayed: bfloat16 rounds.
    config = _object(folder / DEEPSPEED)
    precision = "bfloat16" if config.get("bf16", {}).get("enabled") else "float32"
    job = job_of(replace(run, engine=replace(run.engine, precision=precision)))
    # A frozen model of the run may be another run's student.
    job.weights = sources_of(job_of)
    return job


_object = partial(files.read_json, where="replay", holds=dict, remedy="Restore it.")
_NUMBER = (int, float)
# What is used of an incident, here and in what is printed.
_KEYS: dict[str, type | tuple[type, ...]] = {
    **dict.fromkeys(("index", "epoch", "world_size", "micro_batch_size"), int),
    **dict.fromkeys(("off", "images", "ranks"), list),
    "grad_norm": _NUMBER,
    "layers": dict,
}


def _check(said: Mapping[str, Any]) -> None:
    """Raises KeyError, TypeError or ValueError where something is not what the guard writes."""
    for name, kind in _KEYS.items():
        if not isinstance(said[name], kind):
            raise TypeError(f"{name} {said[name]!r}")
    if said["micro_batch_size"] < 1:
        raise ValueError(f"micro_batch_size {said['micro_batch_size']}")
    numbers = dict(said["layers"])
    for off in said["off"]:
        numbers |= {f"{off['what']}: value": off["value"]}
        for name in ("median", "limit"):
            numbers |= {} if off[name] is None else {f"{off['what']}: {name}": off[name]}
    for name, value in numbers.items():
        if not isinstance(value, _NUMBER):
            raise TypeError(f"{name} {value!r}")
