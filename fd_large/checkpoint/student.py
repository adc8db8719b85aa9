"""A run's student as a source of weights, like a file: read lazily, straight from a checkpoint."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from fd_large.backbones.statistics import IMAGENET, Statistics
from fd_large.checkpoint import store, stream
from fd_large.checkpoint.read import Reader
from fd_large.errors import CheckpointError, ConfigError
from fd_large.plan.parameters import shapes
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.run import Run
from fd_large.weights.read import Tensors
from fd_large.weights.source import Stored, serve


def trained_at(run: Run) -> Architecture:
    """The student's architecture with the image size that its windows and tables are for."""
    architecture = run.student_architecture()
    if run.task.name == "detection" and architecture.family == "vit":
        return architecture  # A detector keeps the grid of the distillation.
    if architecture.family == "swin" or (
        architecture.family == "swinv2" and architecture.absolute_position
    ):
        return architecture  # Its tensors are made for its own size, whatever the images have.
    return replace(architecture, image_size=run.data.image_size)


def student_of(path: Path, where: str) -> Stored | None:
    """Opens the student of a run's newest sound checkpoint, or of a checkpoint by its own path.

    Every file is checked against its receipt, once in a process. No collective: ranks that look
    while another run trains may see different checkpoints, so the result names the one it took.

    Args:
        path: The folder of a run, or step_NNNNNNNN in its checkpoints.
        where: What the user set, for messages.

    Returns: None if the path is neither.
    Raises: CheckpointError: if no checkpoint is sound, or it is of another model than its recipe.
    """
    is_checkpoint = path.name.startswith("step_") and store.manifest_of(path) is not None
    if not is_checkpoint and not store.checkpoints_of(path).is_dir():
        return None
    return _opened(stream.newest(path, where=where), where)


def serve_runs() -> None:
    """Lets `weights` take the folder of a run, which it knows nothing of, as a source."""
    serve(student_of)


def _opened(reader: Reader, where: str) -> Stored:
    try:
        run = Run.from_dict(reader.manifest["recipe"])
        architecture = trained_at(run)
    except (KeyError, ConfigError) as error:
        raise CheckpointError(
            f"{where}: {reader.path}: its manifest holds no recipe that can be read; got {error}, "
            "expected what the run wrote. Export the student with the release that wrote it."
        ) from error
    table, fresh = shapes(architecture), {}
    statistics = IMAGENET
    if run.task.name == "finetune":
        if stated := run.task.finetune.statistics:
            statistics = Statistics(tuple(stated[:3]), tuple(stated[3:]))
        if architecture.family == "vit":
            # A classifier norms the mean of a ViT's tokens and leaves the tokens as they are.
            fresh = {"norm.weight": 1.0, "norm.bias": 0.0}
    if run.task.name == "detection":
        # A detector norms each stage's map for itself, and has no tokens but patches.
        own = {"norm.weight": 1.0, "norm.bias": 0.0, "cls_token": 0.0, "dist_token": 0.0}
        fresh = {name: value for name, value in own.items() if name in table}
    return Stored(reader.path, _Tensors(reader, table, fresh), architecture, statistics)


class _Tensors(Tensors):
    """The weights of a student, each read from the ranks' files when it is asked for.

    Args:
        reader: Of its checkpoint.
        table: Shape of each tensor.
        fresh: Values of those that the task did without.
    """

    def __init__(
        self, reader: Reader, table: dict[str, stream.Shape], fresh: dict[str, float]
    ) -> None:
        super().__init__({})
        stored = {name: shape for name, shape in table.items() if name not in fresh}
        stream.check(reader, stored, prefix=stream.STUDENT)
        self._reader, self._table, self._fresh = reader, table, fresh

    def __getitem__(self, name: str) -> Tensor:
        reader = self._reader
        if name in self._fresh:
            return torch.full(self._table[name], self._fresh[name])
        name, shape = f"{stream.STUDENT}{name}", self._table[name]
        return stream.read(reader, name, shape, kind=stream.outcome(reader))

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def shape(self, name: str) -> stream.Shape:
        """Returns a tensor's shape without reading it."""
        return self._table[name]

    def dtype(self, name: str) -> torch.dtype:
        """Returns float32, the type of every master."""
        return torch.float32
