"""Repeats a step that the guard refused, in one process on one device, by plain torch.

The guard refuses a step with an abnormal loss or gradient norm, and writes an incident, the record
of the step. The weights come from a checkpoint of any number of ranks and any ZeRO stage, and the
images from the incident's files; the drop path is drawn again from seed, epoch and positions. So
the replayed losses equal the recorded losses if the checkpoint holds the weights that the step ran
on.
"""

from __future__ import annotations

import logging
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
from fd_large.engine.job import JobOf, TrainingJob
from fd_large.engine.student import group_norms
from fd_large.engine.task import Task
from fd_large.engine.zero import partition
from fd_large.engine.zero.config import computes_in_bfloat16
from fd_large.errors import CheckpointError, ConfigError
from fd_large.files import kind_of
from fd_large.ranks import distributed
from fd_large.recipes.file_names import DEEPSPEED, INCIDENT, INCIDENTS, RECIPE, STEP
from fd_large.runtime.guard import INCIDENTS_WITH_IMAGES

log = logging.getLogger(__name__)

_object = partial(files.read_json, where="replay", holds=dict, remedy="Restore it.")


class MicroBatch(NamedTuple):
    """One micro batch of a step that the guard refused because of an abnormal loss or gradient.

    If images of several ranks share the statistics of batch norms, there is a single micro batch
    with the images of all ranks.

    Attributes:
        rank: The rank that computed the micro batch; 0 for the images of all ranks.
        batch: The uint8 images that the rank trained on, with their positions in the epoch's order.
        names: The images' names.
        recorded: Loss of the micro batch in the run; for the images of all ranks, the mean loss.
    """

    rank: int
    batch: Batch
    names: list[str]
    recorded: float


class Replayed(NamedTuple):
    """A step that the guard refused, as recorded in the run and as replayed.

    Attributes:
        folder: The run's folder.
        incident: The content of incident.json.
        checkpoint: Number of finished steps of the checkpoint that gave the weights.
        precision: Precision of the step, float32 or bfloat16.
        micro_batches: The micro batches whose images were kept.
        losses: The replayed loss of each micro batch.
        grad_norm: L2 norm of the gradient of the micro batches' mean loss.
        other_training: Why the checkpoint belongs to another training
            (`TrainingJob.check_stored`), or "" if it belongs to this training.
    """

    folder: Path
    incident: dict[str, Any]
    checkpoint: int
    precision: str
    micro_batches: list[MicroBatch]
    losses: list[float]
    grad_norm: float
    other_training: str


def replay(path: Path, job_of: JobOf) -> Replayed:
    """Runs forward and backward of a step again that the guard refused.

    `path` is incident.json inside the run's folder, or the folder of incident.json.

    Raises:
        ConfigError: If the incident does not exist, is damaged, is outside of its run's folder or
            has no images, or if the task learns from more than images.
        CheckpointError: If no checkpoint of the run is sound, or the checkpoint is not of the
            recipe's model.
        WeightsError: If a weights file that the task needs is gone.
    """
    file = path / INCIDENT if kind_of(path) == "folder" else path
    incident, micro_batches = _read(file)
    folder = file.absolute().parents[2]
    job, precision = _job(folder, job_of)
    reader = _weights(folder, incident["index"])
    bfloat16 = computes_in_bfloat16(precision)
    job.build(bfloat16=bfloat16, node_size=1, persistence_threshold=0)
    task = _task(job, reader, bfloat16=bfloat16)
    micro_batches = _with_whole_groups(
        task, job.run.norm_batch(), micro_batches, ranks=len(incident["ranks"]), file=file
    )
    batches = [micro_batch.batch for micro_batch in micro_batches]
    losses, grad_norm = _step(task, batches, job.run.runtime.seed)
    other_training = ""
    try:
        job.check_stored(reader.manifest)
    except CheckpointError as error:
        other_training = str(error)
    update = reader.manifest["update"]
    return Replayed(
        folder, incident, update, precision, micro_batches, losses, grad_norm, other_training
    )


def _read(file: Path) -> tuple[dict[str, Any], list[MicroBatch]]:
    """Reads an incident, whose record is the JSON `file`, and the images beside this file.

    Returns the content of the JSON, and the micro batches whose images were kept.

    Raises: ConfigError: if the incident is missing or damaged, or has no images.
    """
    if kind_of(file) != "file":
        raise ConfigError(
            f"replay: {file}: incident not found; got no such file, expected RUN/{INCIDENTS}/"
            f"{STEP}NNNNNNNN/{INCIDENT}. Name an incident of the guard."
        )
    incident = _object(file)
    try:
        _require_numbers(incident)
        names = [name for name in incident["images"] if kind_of(file.parent / name) == "file"]
        micro_batches = [
            micro_batch for name in names for micro_batch in _of_rank(file.parent / name, incident)
        ]
    except (KeyError, IndexError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise ConfigError(
            f"replay: {file}: damaged; got {type(error).__name__} {error}, expected the file that "
            "the guard wrote. Replay another incident."
        ) from error
    if not micro_batches:
        raise ConfigError(
            f"replay: {file}: the images of this incident are gone; got no images, expected the "
            f"images of a rank. The newest {INCIDENTS_WITH_IMAGES} incidents keep their images: "
            "replay one of them."
        )
    return incident, micro_batches


def _require_numbers(incident: dict[str, Any]) -> None:
    """Checks that the entries of incident.json that are used or shown are numbers.

    Raises:
        KeyError, TypeError or ValueError: If an entry is missing or no valid number.
    """
    values = [incident[name] for name in ("index", "epoch", "world_size", "grad_norm")]
    for off in incident["off"]:
        values += [off["value"], *(off[n] for n in ("median", "limit") if off[n] is not None)]
    for value in values:
        if not isinstance(value, (int, float)):
            raise TypeError(f"{value!r}, not a number")
    if incident["micro_batch_size"] < 1:
        raise ValueError(f"micro_batch_size {incident['micro_batch_size']}")


def _of_rank(images: Path, incident: dict[str, Any]) -> list[MicroBatch]:
    """Returns the micro batches that one rank computed in the step of an incident.

    Args:
        images: The file rank_NNNNN.safetensors, with the images of that rank and their positions.
        incident: The content of incident.json, with the images' names and the losses.

    Raises: ValueError: if the numbers of images, names and positions differ.
    """
    stored, size = load_file(images), incident["micro_batch_size"]
    rank = int(images.stem.removeprefix("rank_"))
    recorded = incident["ranks"][rank]
    parts = stored["images"].split(size)
    if "sizes" in stored:  # Files of older versions have one size.
        sizes = zip(parts, stored["sizes"].tolist(), strict=True)
        parts = [part[..., :height, :width] for part, (height, width) in sizes]
    names, positions = recorded["names"], stored["positions"].split(size)
    counts = {len(names), len(stored["positions"]), len(stored["images"])}
    if len(counts) > 1:
        raise ValueError(f"{images.name}: {counts} images")
    names = [names[first : first + size] for first in range(0, len(names), size)]
    return [
        MicroBatch(rank, Batch(pixels, incident["epoch"], places, places), part_names, loss)
        for pixels, places, part_names, loss in zip(
            parts, positions, names, recorded["losses"], strict=True
        )
    ]


def _weights(folder: Path, step: int) -> Reader:
    """Opens a run's newest sound checkpoint with at most `step` finished steps.

    If there is none, opens the oldest sound checkpoint with more steps.

    Raises: CheckpointError: if no checkpoint is sound.
    """
    stored = store.complete(folder)
    before = [item for item in stored if item.update <= step]
    complaint = "none"
    for item in (*reversed(before), *stored[len(before) :]):
        if not (problems := store.verify(item, {"master"})):
            return Reader(item, {"master"})
        complaint = f"{item.path.name}: {problems[0]}"
        log.error("DAMAGED CHECKPOINT, skipped: %s", complaint)
    raise CheckpointError(
        f"replay: {store.checkpoints_of(folder)}: no sound checkpoint; got {complaint}, expected "
        "a sound checkpoint of the run. Restore one, preferably the newest before the incident."
    )


def _job(folder: Path, job_of: JobOf) -> tuple[TrainingJob, str]:
    """Returns the job of the run in a folder, set to a single process.

    Also returns the precision in which the run computed, "float32" or "bfloat16".

    Raises: ConfigError: if the folder has no recipe, or the task learns from more than images.
    """
    if kind_of(folder / RECIPE) != "file":
        raise ConfigError(
            f"replay: {folder}: the incident is not in its run's folder; got no {RECIPE} there, "
            "expected the folder of a run. Put the incident back into RUN/incidents."
        )
    job = job_of(_object(folder / RECIPE))
    if not job.learns_from_images_alone:
        raise ConfigError(
            f"replay: {folder}: its incidents lack inputs of the task; got the task "
            f"{job.run.task.name}, expected a task that needs only images. Check the layers named "
            "in the incident."
        )
    # In the run's own precision, wherever it is replayed: bfloat16 rounds.
    config = _object(folder / DEEPSPEED)
    precision = "bfloat16" if config.get("bf16", {}).get("enabled") else "float32"
    run = job.run.in_one_process()
    job = job_of(replace(run, engine=replace(run.engine, precision=precision)))
    # A frozen model of the run may be another run's student.
    job.weights = sources_of(job_of)
    return job, precision


def _task(job: TrainingJob, reader: Reader, *, bfloat16: bool) -> Task:
    student, task = job.run.student, stored_task(job.make_task, reader, kind="master")
    if bfloat16:
        partition.to_bfloat16(task)
    task.to(distributed.device()).train()
    if student.activation_checkpointing != "off":
        # Offloading the inputs would make no difference to the numbers.
        checkpoint_blocks(task.student.blocks(), mode="every", every=student.checkpoint_every)
    return task


def _with_whole_groups(
    task: Task, group: int, micro_batches: list[MicroBatch], *, ranks: int, file: Path
) -> list[MicroBatch]:
    """Returns the micro batches; joins them into one if groups of a batch norm span ranks.

    A group has the `group` images that share statistics; 0 stands for no groups. The task's batch
    norms get their groups here. `ranks` counts the run's ranks; `file` is incident.json, for
    messages.

    Raises: ConfigError: if images of a group were not kept.
    """
    group_norms(task, group)
    if not task.student_norms() or not group or len(micro_batches[0].names) % group == 0:
        return micro_batches
    if len(kept_ranks := {micro_batch.rank for micro_batch in micro_batches}) < ranks:
        raise ConfigError(
            f"replay: {file}: images that share batch norm statistics were on several ranks; got "
            f"the images of {len(kept_ranks)} of {ranks} ranks, expected all images. Check the "
            "layers named in the incident."
        )
    batches = [micro_batch.batch for micro_batch in micro_batches]
    images, places = (
        torch.cat([getattr(batch, name) for batch in batches]) for name in ("images", "positions")
    )
    names = [name for micro_batch in micro_batches for name in micro_batch.names]
    recorded = sum(micro_batch.recorded for micro_batch in micro_batches) / len(micro_batches)
    return [MicroBatch(0, Batch(images, batches[0].epoch, places, places), names, recorded)]


def _step(task: Task, batches: list[Batch], seed: int) -> tuple[list[float], float]:
    """Runs the micro batches of all ranks forward and backward, outside of an engine.

    Returns the loss of each micro batch, and the L2 norm of the mean loss's gradient.
    """
    trained = [parameter for parameter in task.parameters() if parameter.requires_grad]
    sums = [torch.zeros_like(parameter, dtype=torch.float32) for parameter in trained]
    losses: list[Tensor] = []
    # One process has the micro batches of all ranks.
    for arguments in arguments_of_step(task, task, batches, seed, count=len(batches)):
        loss, _ = task(**arguments)
        (loss / len(batches)).backward()
        losses.append(loss.detach())
        for parameter, gradient in zip(trained, sums, strict=True):
            if parameter.grad is not None:
                gradient += parameter.grad
                parameter.grad = None
    norm = torch.stack([gradient.norm() for gradient in sums]).norm()
    return torch.stack(losses).tolist(), norm.item()
