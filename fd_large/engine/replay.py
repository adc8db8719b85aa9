"""A step that the guard refused, once more: one process, one device, plain torch.

Weights come from a checkpoint, whatever ranks and ZeRO stage wrote it; images from the incident;
drop path is drawn again from seed, epoch and positions. So the loss is the recorded one wherever
the checkpoint holds the weights that the step ran on.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from fd_large import distributed
from fd_large.checkpoint import store
from fd_large.checkpoint.read import Reader
from fd_large.data.loader import Batch
from fd_large.engine.block_wrappers import checkpoint_blocks
from fd_large.engine.checkpoint_models import serve_runs, stored_task
from fd_large.engine.forward_backward import prepared
from fd_large.engine.incident_evidence import note_maximum, outputs_to
from fd_large.engine.job import Job
from fd_large.engine.task import Task
from fd_large.engine.zero import partition
from fd_large.engine.zero.config import computes_in_bfloat16
from fd_large.errors import CheckpointError, ConfigError
from fd_large.recipes.run import Run
from fd_large.runtime.guard import FILE, INCIDENTS_WITH_IMAGES, roll_backs_of
from fd_large.runtime.meter import rows_before

log = logging.getLogger(__name__)


class Pictures(NamedTuple):
    """One rank's part of the step.

    Attributes:
        rank: Who ran it.
        images: (B, 3, S, S) uint8.
        positions: (B,) int64.
        losses: Recorded, of its micro batches.
    """

    rank: int
    images: Tensor
    positions: Tensor
    losses: list[float]


class Incident(NamedTuple):
    """A refused step as its folder tells it.

    Attributes:
        folder: Of the run.
        job: The run's, in the precision that it had, with nothing split over ranks.
        said: incident.json.
        images: Of the ranks whose images are kept.
    """

    folder: Path
    job: Job
    said: dict[str, Any]
    pictures: list[Pictures]


class Weights(NamedTuple):
    """What the step is run on.

    Attributes:
        reader: Of the checkpoint.
        update: Steps of it.
        accepted_between: Steps that moved the step's weights and not these, but for those that a
            roll-back undid; 0: these are the weights that the step ran on. None: it is later than
            the step.
    """

    reader: Reader
    update: int
    accepted_between: int | None


class Replayed(NamedTuple):
    """What came out.

    Attributes:
        losses: Rank -> loss of each micro batch.
        grad_norm: Of the mean loss over all replayed images.
        forward: Layer -> largest magnitude of its output, in execution order.
        gradient: Layer -> largest magnitude of the gradient at its output.
        other_training: What `Job.check_stored` has against the checkpoint; empty: nothing.
    """

    losses: dict[int, list[float]]
    grad_norm: float
    forward: dict[str, float]
    gradient: dict[str, float]
    other_training: str


def read_incident(path: Path, job_of: Callable[[Run], Job]) -> Incident:
    """Reads incident.json, or the folder that holds it, where the run wrote it.

    Args:
        path: One of the two.
        job_of: Makes the job of the run's recipe.

    Raises: ConfigError: if it is none, is damaged, stands outside of its run, or has no images
        any more.
    """
    file = path / FILE if path.is_dir() else path
    if not file.is_file():
        raise ConfigError(
            f"replay: {path}: no incident; got no such file, expected RUN/incidents/"
            f"update_NNNNNNNN/{FILE}. Name one that the guard has written."
        )
    said = _object(file)
    folder = file.absolute().parents[2]
    if not (folder / "recipe.json").is_file():
        raise ConfigError(
            f"replay: {file}: outside of its run; got no recipe.json in {folder}, expected the "
            "folder of a run. Put the incident back into RUN/incidents."
        )
    pictures = []
    try:
        _check(said)
        for name in said["images"]:
            if (file.parent / name).is_file():
                stored = load_file(file.parent / name)
                rank = int(name.split(".")[0].removeprefix("rank_"))
                losses = said["ranks"][rank]["losses"]
                pictures.append(Pictures(rank, stored["images"], stored["positions"], losses))
                counts = (len(said["ranks"][rank]["names"]), len(stored["positions"]))
                if counts != (len(stored["images"]),) * 2:
                    raise ValueError(f"{name} has {len(stored['images'])} images, not {counts}")
        if not pictures:
            raise ConfigError(
                f"replay: {file}: its images are gone; got none, expected those of a rank. The "
                f"newest {INCIDENTS_WITH_IMAGES} incidents keep theirs: replay one of them."
            )
        return Incident(folder, _job(folder, job_of), said, pictures)
    except (KeyError, IndexError, TypeError, ValueError, OSError, SafetensorError) as error:
        raise ConfigError(
            f"replay: {file}: damaged; got {type(error).__name__} {error}, expected what the guard "
            "wrote. Replay another incident."
        ) from error


def find_weights(incident: Incident) -> Weights:
    """The newest sound checkpoint of at most the step's update, else the oldest later one.

    Raises: CheckpointError: if the run has none that is sound.
    """
    step = incident.said["index"]
    stored = store.complete(incident.folder)
    before = [item for item in reversed(stored) if item.update <= step]
    complaint = "none"
    for item in (*before, *(item for item in stored if item.update > step)):
        if problems := store.verify(item):
            complaint = f"{item.path.name}: {problems[0]}"
            log.error("DAMAGED CHECKPOINT, passed over: %s", complaint)
            continue
        reader = Reader(item, set(range(item.manifest["world_size"])))
        if item.update > step:
            return Weights(reader, item.update, None)
        rows = rows_before(incident.folder / "metrics.jsonl", step)
        roll_backs = roll_backs_of(incident.folder / "incidents")
        apart = _moved_by(rows, roll_backs, step) ^ _moved_by(rows, roll_backs, item.update)
        return Weights(reader, item.update, len(apart))
    raise CheckpointError(
        f"replay: {store.checkpoints_of(incident.folder)}: no sound checkpoint; got {complaint}, "
        "expected one of the run's. Restore one, the newest before the incident if there is any."
    )


def run_again(incident: Incident, weights: Weights) -> Replayed:
    """Forward and backward over the incident's images, micro batch by micro batch.

    Raises: WeightsError: if the teacher's file is gone; CheckpointError: if the checkpoint is not
        of the recipe's model.
    """
    job = incident.job
    run = job.run
    bfloat16 = computes_in_bfloat16(run.engine.precision)
    job.build(bfloat16=bfloat16, node_size=1, persistence_threshold=0)
    task = _task(job, weights.reader, bfloat16=bfloat16)
    forward: dict[str, Tensor] = {}
    gradient: dict[str, Tensor] = {}

    def note(name: str, output: Tensor) -> None:
        note_maximum(forward, name, output)
        if output.requires_grad:
            output.register_hook(lambda grad: note_maximum(gradient, name, grad))

    gradients = {name: torch.zeros_like(p, dtype=torch.float32) for name, p in _trained(task)}
    losses: dict[int, list[float]] = {}
    count = sum(len(pictures.losses) for pictures in incident.pictures)
    with outputs_to(note, task):
        for pictures in incident.pictures:
            own = losses[pictures.rank] = []
            for batch in _micro_batches(pictures, incident.said):
                loss, _ = task(**prepared(task, batch, run.runtime.seed))
                (loss / count).backward()
                own.append(loss.item())
                for name, parameter in _trained(task):
                    if parameter.grad is not None:
                        gradients[name] += parameter.grad
                        parameter.grad = None
    norm = torch.stack([value.norm() for value in gradients.values()]).norm()
    return Replayed(
        losses,
        norm.item(),
        {name: value.item() for name, value in forward.items()},
        {name: value.item() for name, value in gradient.items()},
        _complaint(job, weights.reader),
    )


def _moved_by(
    rows: Sequence[Mapping[str, Any]], roll_backs: Mapping[int, int], updates: int
) -> set[int]:
    """Which of the first `updates` steps the weights after them descend from."""
    last = max((update for update in roll_backs if update < updates), default=None)
    kept, start = set(), 0
    if last is not None:
        kept, start = _moved_by(rows, roll_backs, min(roll_backs[last], last)), last + 1
    between = (row for row in rows if start <= row["update"] < updates)
    return kept | {row["update"] for row in between if not row.get("skipped")}


def _complaint(job: Job, reader: Reader) -> str:
    try:
        job.check_stored(reader.manifest)
    except CheckpointError as error:
        return str(error)
    return ""


def _task(job: Job, reader: Reader, *, bfloat16: bool) -> Task:
    run, task = job.run, stored_task(job.make_task, reader, kind="master")
    if bfloat16:
        partition.to_bfloat16(task)
    task.to(distributed.device()).train()
    if run.student.activation_checkpointing != "off":
        # Where the inputs wait makes no difference to the numbers.
        checkpoint_blocks(task.student.blocks(), mode="every", every=run.student.checkpoint_every)
    return task


def _trained(task: Task) -> Iterator[tuple[str, nn.Parameter]]:
    return ((name, p) for name, p in task.named_parameters() if p.requires_grad)


def _micro_batches(pictures: Pictures, said: dict[str, Any]) -> Iterator[Batch]:
    size = said["micro_batch_size"]
    for start in range(0, len(pictures.images), size):
        positions = pictures.positions[start : start + size]
        yield Batch(pictures.images[start : start + size], said["epoch"], positions, positions)


def _job(folder: Path, job_of: Callable[[Run], Job]) -> Job:
    # A frozen model of the run may be another run's student.
    serve_runs(job_of)
    job = job_of(Run.from_dict(_object(folder / "recipe.json")))
    if not job.learns_from_images_alone:
        raise ConfigError(
            f"replay: {folder}: its incidents do not hold what the task learns from; got the task "
            f"{job.run.task.name}, expected one that learns from images alone. Look at the layers "
            "that the incident names."
        )
    run = job.in_one_process()
    # bfloat16 overflows nowhere that float32 does not, but it rounds: as the run had it.
    config = _object(folder / "deepspeed.json")
    precision = "bfloat16" if config.get("bf16", {}).get("enabled") else "float32"
    return job_of(replace(run, engine=replace(run.engine, precision=precision)))


# What is used of an incident, here and by whoever tells of it.
_NUMBER = (int, float)
_KEYS: dict[str, type | tuple[type, ...]] = {
    "index": int,
    "epoch": int,
    "world_size": int,
    "micro_batch_size": int,
    "grad_norm": _NUMBER,
    "off": list,
    "images": list,
    "layers": dict,
    "ranks": list,
}


def _check(said: Mapping[str, Any]) -> None:
    """Raises: KeyError, TypeError or ValueError: where something is not what the guard writes."""
    for name, kind in _KEYS.items():
        if not isinstance(said[name], kind):
            raise TypeError(f"{name} {said[name]!r}")
    if said["micro_batch_size"] < 1:
        raise ValueError(f"micro_batch_size {said['micro_batch_size']}")
    for off in said["off"]:
        numbers = (off["value"], *(n for n in (off["median"], off["limit"]) if n is not None))
        if not all(isinstance(number, _NUMBER) for number in numbers):
            raise TypeError(f"{off['what']} {numbers}")
    for name, value in said["layers"].items():
        if not isinstance(value, _NUMBER):
            raise TypeError(f"{name} {value!r}")


def _object(path: Path) -> dict[str, Any]:
    """A JSON object of the run's.

    Raises: ConfigError: if it is missing or damaged.
    """
    try:
        found = json.loads(path.read_text())
        if not isinstance(found, dict):
            raise ValueError("no object")
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"replay: {path}: cannot be read; got {error}, expected what the run wrote. Restore it."
        ) from None
    return found
