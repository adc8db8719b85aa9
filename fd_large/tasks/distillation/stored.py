"""What commands need of a stored run of distillation: export, heads, loss and model card.

The heads predict each teacher's map from the student's map. An export stores the heads in a folder
next to the student, with their tensors and what is needed to construct each head.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fd_large import doors
from fd_large.backbones.exports import PROJECTION
from fd_large.backbones.feature_map import FeatureMap
from fd_large.checkpoint import stream
from fd_large.checkpoint.read import Reader
from fd_large.checkpoint.stream import Shape
from fd_large.engine.checkpoint_models import fill_stored
from fd_large.engine.frozen import Frozen
from fd_large.errors import ConfigError, FDError, WeightsError
from fd_large.files import write_json
from fd_large.tasks.distillation.grids import shapes_of
from fd_large.tasks.distillation.heads import registry
from fd_large.tasks.distillation.heads.map_head import MapHead, MapShapes, with_blocks
from fd_large.tasks.distillation.job import KNOWN, DistillationJob
from fd_large.tasks.distillation.model_card import learned
from fd_large.tasks.distillation.normalisers import NONE, Undo
from fd_large.tasks.distillation.objective import facts_by_teacher
from fd_large.tasks.distillation.registered import register
from fd_large.tasks.distillation.section import MAP, SUMMARY, NamedTeacher
from fd_large.tasks.distillation.target import guess, reads_blocks
from fd_large.tasks.distillation.task import Distillation
from fd_large.tasks.stored_run import StoredRun
from fd_large.weights import read
from fd_large.weights.export import write_shards
from fd_large.weights.libraries import To
from fd_large.weights.model_card import Learned

log = logging.getLogger(__name__)

_FILE = "config.json"


@dataclass(frozen=True, kw_only=True)
class HeadFacts:
    """What is needed to construct a head and to run it on a student's map.

    Attributes:
        head: Name of the head in the recipe.
        width: Number of channels of the student's tokens.
        teacher_width: Number of channels of the head's output.
        maps: The shapes from which a `MapHead` is made.
        kind: "map" or "summary".
        with_prefix: Whether the prefix tokens (CLS) of the map are learnt too.
        num_prefix_tokens: Number of tokens before the patches of the teacher's map.
        normaliser: Name of the normaliser of the teacher's tokens.
    """

    head: str
    width: int
    teacher_width: int
    maps: MapShapes
    kind: str
    with_prefix: bool
    num_prefix_tokens: int
    normaliser: str


class StoredHead(nn.Module):
    """A head that predicts a teacher's map or summary of images from the student's map.

    The weights are random until they are loaded.

    Args:
        facts: What is needed to construct the head.
        undo: Inverse of the normaliser; None if the normaliser has no inverse or changes nothing.

    Attributes:
        facts: See the arguments.
        head: The Module that predicts the teacher's tokens from the student's tokens or maps.
    """

    def __init__(self, facts: HeadFacts, undo: Undo | None) -> None:
        super().__init__()
        self.facts, self.undo = facts, undo
        self.head = registry.make(facts.head, facts.width, facts.teacher_width, lambda: facts.maps)

    def forward(
        self, backbone: nn.Module, pixels: Tensor, *, in_teacher_units: bool = False
    ) -> FeatureMap:
        """Returns the predicted map, which for a summary has a single patch.

        Args:
            backbone: The run's student.
            pixels: (B, 3, H, W) float32, normalised for the student.
            in_teacher_units: Whether the normaliser is undone, so that the map predicts the
                teacher's own tokens and not its normalised tokens.

        Raises: ConfigError: if the normaliser cannot be undone.
        """
        if reads_blocks(self.head):
            student, blocks = with_blocks(backbone, partial(backbone, pixels))
        else:
            student, blocks = backbone(pixels), ()
        prediction = guess(
            self.head,
            student,
            blocks,
            kind=self.facts.kind,
            with_prefix=self.facts.with_prefix,
            num_prefix_tokens=self.facts.num_prefix_tokens,
        )
        if not in_teacher_units or self.facts.normaliser == NONE:
            return prediction
        if self.undo is None:
            raise ConfigError(
                "teacher_map: the head's output cannot be converted to the teacher's units; got "
                f"the normaliser {self.facts.normaliser}, expected a normaliser that keeps length "
                f"and mean of a token, such as {NONE} or phi_s. Train with such a normaliser."
            )
        return prediction._replace(
            tokens=self.undo(prediction.tokens, prediction.num_prefix_tokens)
        )

    def prefix_tokens(self, of_student: int) -> int:
        """Returns the number of tokens before the patches in the prediction.

        Args:
            of_student: Number of prefix tokens of the student's map.
        """
        if isinstance(self.head, MapHead):
            return self.head.num_prefix_tokens
        of_map = self.facts.kind == MAP and self.facts.with_prefix
        return of_student if of_map and of_student == self.facts.num_prefix_tokens else 0


def fill_heads(
    task: Distillation,
    teachers: Mapping[str, Frozen],
    entries: Mapping[str, NamedTeacher],
    *,
    image_size: int,
    fill: Callable[[], object],
) -> dict[str, StoredHead]:
    """Returns the heads of a task by the labels of the heads' targets.

    The head of a single teacher's map is named "teacher". Memory is allocated only for the Modules
    of the targets; the rest of the task stays on the meta device.

    Args:
        task: The task with these teachers, on the meta device; its heads are replaced.
        teachers: The teachers by name.
        entries: The recipe's entry of each teacher, by name, from `DistillationJob.settled`.
        image_size: Side of the student's images, in pixels.
        fill: Loads the task's tensors that are not on the meta device; called after the heads are
            allocated.
    """
    images = torch.empty(1, 3, image_size, image_size, dtype=torch.uint8, device="meta")
    prefixes = {name: model(images).num_prefix_tokens for name, model in teachers.items()}
    heads = {}
    for target in task.targets:
        entry, teacher = entries[target.teacher], teachers[target.teacher]
        with_prefix = SUMMARY not in entry.targets
        facts = HeadFacts(
            head=entry.setting("head", target.kind),
            width=task.sight.width(task.student),
            teacher_width=entry.width_of(target.kind, teacher.width),
            maps=shapes_of(
                task.student, teacher, image_size, kind=target.kind, with_prefix=with_prefix
            ),
            kind=target.kind,
            with_prefix=with_prefix,
            num_prefix_tokens=prefixes[target.teacher],
            normaliser=entry.setting("normaliser", target.kind),
        )
        for module in target.modules().values():
            if module is not target.head:
                module.to_empty(device="cpu")
        heads[target] = StoredHead(facts, None)
        target.head = heads[target].head
        register(task, target.path, target.head, replace=True)
    fill()
    for target, head in heads.items():
        if undo := getattr(target.normalise, "undo", None):
            head.undo = undo()
    return {target.label or "teacher": head for target, head in heads.items()}


def projection_shapes(
    reader: Reader, student: Mapping[str, Shape], state: Callable[[int], Any] | None
) -> dict[str, Shape]:
    """Returns the shapes of the tensors of a single teacher's linear head, by tensor name.

    This function also checks the shapes of all tensors of the checkpoint.

    Args:
        reader: The checkpoint.
        student: Shapes of the student's tensors, by their names in the student.
        state: Constructor of a normaliser with running statistics, from the number of channels;
            None if the run has no such normaliser.

    Raises: CheckpointError: if the checkpoint is of another task.
    """
    sizes = reader.layout.sizes
    width = sizes.get(f"{PROJECTION}bias", 0)
    projection: dict[str, Shape] = {
        f"{PROJECTION}weight": (width, sizes.get(f"{PROJECTION}weight", 0) // max(width, 1)),
        f"{PROJECTION}bias": (width,),
    }
    whole = {f"{stream.STUDENT}{name}": shape for name, shape in student.items()}
    for path, module in state(width).state("").items() if state else ():
        whole |= {f"{path}.{name}": tuple(buffer.shape) for name, buffer in module.named_buffers()}
    stream.check(reader, whole | projection)
    return projection


def write(heads: Mapping[str, StoredHead], folder: Path, *, task: str, shard_size: int) -> None:
    """Writes heads into a new folder.

    Args:
        heads: The heads by the labels of the heads' targets.
        folder: The folder, which must not exist yet.
        task: Name of the task that reads the heads.
        shard_size: Largest size of a file of tensors, in bytes.
    """
    folder.mkdir()
    tensors = _module(heads).state_dict()
    shapes = [(name, tuple(tensor.shape)) for name, tensor in tensors.items()]
    write_shards(folder, shapes, tensors.items(), shard_size)
    facts = {label: asdict(head.facts) for label, head in heads.items()}
    write_json(folder / _FILE, {"task": task, "heads": facts})


def read_heads(folder: Path) -> dict[str, StoredHead]:
    """Reads the heads that `write` wrote, by the labels of the heads' targets.

    Args:
        folder: The folder of the heads.

    Raises:
        WeightsError: if a file is damaged.
        ConfigError: if a head is the user's own code, and that code is not allowed to run.
    """
    where = str(folder)
    tensors = read.read(folder, where=where)
    try:
        listed = {
            label: HeadFacts(**{**facts, "maps": _maps(facts["maps"])})
            for label, facts in read.read_json(folder / _FILE, where=where)["heads"].items()
        }
        doors.require_allowed({f"{where}: {n}": facts.head for n, facts in listed.items()})
        heads = {
            label: StoredHead(facts, _undo(tensors, f"heads.{label}.undo."))
            for label, facts in listed.items()
        }
        _module(heads).load_state_dict(dict(tensors))
    except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{where}: not the heads of an export; got {type(error).__name__} "
            f"{str(error)[:200]}, expected the files as they were exported. Export the run again."
        ) from error
    return heads


def _module(heads: Mapping[str, StoredHead]) -> nn.Module:
    """Returns a Module of all heads, whose state_dict has the names heads.LABEL.*.

    Args:
        heads: The heads by LABEL, the label of a head's target.
    """
    return nn.ModuleDict({"heads": nn.ModuleDict(dict(heads))})


def _maps(values: Any) -> MapShapes:
    """Returns the `MapShapes` that config.json stores as the list `values` of its four fields."""
    student, teacher, prefix, blocks = values
    return MapShapes(tuple(student), tuple(teacher), prefix, blocks)


def _undo(tensors: Mapping[str, Tensor], prefix: str) -> Undo | None:
    """Returns the inverse of a head's normaliser from stored tensors; None if none is stored.

    Args:
        tensors: The stored tensors of all heads, by name.
        prefix: What the names of the inverse's tensors begin with.
    """
    constants = {name: tensors.get(f"{prefix}{name}") for name in ("mean", "scale", "rotation")}
    if constants["mean"] is None:
        return None
    return Undo(**constants)


class StoredDistillation(StoredRun):
    """The stored run of a distillation, with a student and a head for each target."""

    job: DistillationJob
    loss_name = "the run's own objective"

    def exported_beside(
        self, reader: Reader, student: Mapping[str, Shape], to: To
    ) -> Mapping[str, Shape]:
        """Returns the shapes of the tensors of a linear head, if the format "fd" is exported.

        The result is empty for other formats. It is also empty for a run with several teachers,
        with a head that is not linear, or with a mask; in such a run this method checks only the
        shapes of the student's tensors. In other runs it checks the shapes of all tensors of the
        checkpoint.

        Args:
            reader: The checkpoint that is exported.
            student: Shapes of the student's tensors, by their names in the student.
            to: The format.
        """
        if self.run.teachers or self.run.objective.head != "linear" or self.run.mask.hides:
            stream.check(reader, dict(student), prefix=stream.STUDENT)
            return {}
        state = KNOWN.moving.get(self.run.objective.normaliser)
        projection = projection_shapes(reader, student, state)
        return projection if to == "fd" else {}

    def learned(self, manifest: Mapping[str, Any], to: To) -> Learned:
        """Returns what the model card says on the teachers, the losses and the crops.

        Args:
            manifest: Manifest of the checkpoint that is exported.
            to: The format; not used.
        """
        facts = facts_by_teacher(manifest, several=bool(self.run.teachers))
        return learned(self.run.taught_by, facts, self.run.data)

    def heads(self, reader: Reader) -> Mapping[str, StoredHead]:
        """Returns the heads of a checkpoint by the labels of the heads' targets.

        The head of a single teacher's map is named "teacher". Memory is allocated for the heads
        alone; of other tensors only the shapes are compared with the checkpoint.

        Args:
            reader: The checkpoint.

        Raises: ConfigError: if the heads read the output of a decoder.
        """
        job = self.job
        if self.run.mask.decodes:
            raise ConfigError(
                "teacher_map: this run's heads read the map of a decoder, not the student's own; "
                f"got mask.tokens {self.run.mask.tokens} with mask.student dropped, expected heads "
                "that read the student's map. Use the student without its heads."
            )
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
        """Writes the heads of all teachers into a folder, or logs a warning if they cannot be made.

        Args:
            reader: The checkpoint that is exported.
            folder: The folder, which must not exist yet.
            shard_size: Largest size of a file of tensors, in bytes.
        """
        try:
            heads = self.heads(reader)
        except FDError as error:
            log.warning("export: the heads are left out, the student is complete: %s", error)
            return
        write(heads, folder, task=self.run.task.name, shard_size=shard_size)

    exported_heads = staticmethod(read_heads)
