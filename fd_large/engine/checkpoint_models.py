"""Builds a task from a run's checkpoint, or opens a checkpoint's student as a source of weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fd_large import doors
from fd_large.backbones.registry import parameter_shapes
from fd_large.checkpoint import store, stream
from fd_large.checkpoint.read import Reader
from fd_large.engine.job import JobOf, StoredStudent
from fd_large.engine.task import Task
from fd_large.engine.zero import partition
from fd_large.errors import CheckpointError, ConfigError
from fd_large.files import kind_of
from fd_large.recipes.family import FamilyArchitecture
from fd_large.weights.read import Tensors
from fd_large.weights.resolve import Sources, Stored

AnyTask = TypeVar("AnyTask", bound=Task)


def stored_task(make: Callable[[], AnyTask], reader: Reader, *, kind: str) -> AnyTask:
    """Builds a task with the weights of a checkpoint, unsharded, in float32 and in host memory.

    This function needs neither a process group nor an engine.

    Args:
        make: Constructs the task.
        reader: The checkpoint, whatever ranks and ZeRO stage wrote it.
        kind: "master" for the weights, or "ema" for their moving average (`stream.outcome` says
            which of the two is the run's result).

    Raises: CheckpointError: if the checkpoint is of another task.
    """
    task = partition.build(make, {}, partitioned=False, seed=0)
    fill_stored(task, reader, kind=kind)
    return task


def fill_stored(task: Task, reader: Reader, *, kind: str) -> None:
    """Copies the weights of a checkpoint into a task that is not sharded, in host memory.

    A tensor on the meta device gets no values: only its name and shape are compared with the
    checkpoint. For `reader` and `kind` see `stored_task`.

    Raises: CheckpointError: if the checkpoint is of another task.
    """
    for code, made_by in _recorded_code(reader).items():
        doors.warn_if_changed(code, made_by, model=str(reader.path))
    tensors = dict(task.named_parameters()) | partition.running_statistics(task)
    stream.check(reader, {name: tuple(tensor.shape) for name, tensor in tensors.items()})
    with torch.no_grad():
        for name, tensor in tensors.items():
            if not tensor.is_meta:
                tensor.copy_(stream.read(reader, name, tuple(tensor.shape), kind=kind))


def sources_of(
    job_of: JobOf,
    *,
    guesses: bool = False,
    settled: Mapping[str, tuple[float, ...]] | None = None,
) -> Sources:
    """Returns sources of weights that can also open the student in a run's folder.

    `job_of` makes the job of a stored recipe, which describes the student; for the rest see
    `Sources`.
    """
    return Sources(
        lambda path, where: student_of(path, where, job_of), guesses=guesses, settled=settled
    )


def student_of(path: Path, where: str, job_of: JobOf) -> Stored | None:
    """Opens the student of a run's newest checkpoint, or of the checkpoint at a path.

    Rank 0 alone checks the checkpoint's bytes. The ranks do not communicate, and may find different
    checkpoints if the run is still training. So the result names the checkpoint that was opened,
    and all ranks must then open the checkpoint that rank 0 has found.

    Args:
        path: The folder of a run, or step_NNNNNNNN in its checkpoints.
        where: The field that the user set, for messages.
        job_of: Makes the job of the stored recipe.

    Returns: the student; None if the path is neither a run nor a checkpoint.

    Raises:
        CheckpointError: If the run has no checkpoint, the checkpoint is damaged, or the recipe in
            its manifest cannot be read.
    """
    is_checkpoint = store.manifest_of(path) is not None
    if not is_checkpoint and kind_of(store.checkpoints_of(path)) != "folder":
        return None
    reader = stream.newest(path, where=where)
    try:
        student = job_of(reader.manifest["recipe"]).stored_student()
    except (KeyError, ConfigError) as error:
        raise CheckpointError(
            f"{where}: {reader.path}: the recipe in its manifest cannot be read; got {error}, "
            "expected the run's own recipe. Export the student with the release that wrote it."
        ) from error
    sizes = reader.layout.sizes
    return Stored(
        reader.path,
        student_tensors(reader, student),
        student.architecture,
        student.statistics,
        {
            n.removeprefix(stream.STUDENT): s
            for n, s in sizes.items()
            if n.startswith(stream.STUDENT)
        },
    )


def student_tensors(reader: Reader, student: StoredStudent) -> Tensors:
    """Returns the tensors of a checkpoint's student by name; each is read when it is accessed.

    At the first access, names and shapes are compared with those in the checkpoint. If the student
    is a model of the user's own, and its source file has changed since, a warning is logged.
    """
    warn_of_changed_code(reader, student.architecture)
    return _Tensors(reader, lambda: parameter_shapes(student.architecture), student.absent)


def code_hash(reader: Reader, architecture: FamilyArchitecture) -> str:
    """Returns the SHA-256 of the user's own source file that defines the model of a checkpoint.

    If the checkpoint has no hash, because an earlier version wrote it, the result is that of the
    file as it is now. The result is "" if the model is not the user's own.
    """
    code = architecture.code
    recorded = _recorded_code(reader).get(code)
    return recorded or doors.hashes(code).get(code, "")


def _recorded_code(reader: Reader) -> dict[str, str]:
    """Returns {file as in the recipe: SHA-256} of the user's own source files, from a manifest.

    The result is {} if the manifest has no dict of hashes. The manifest may come from somebody
    else, so its types are checked.
    """
    code = reader.manifest.get("code")
    return {name: str(digest) for name, digest in code.items()} if isinstance(code, dict) else {}


def warn_of_changed_code(reader: Reader, architecture: FamilyArchitecture) -> None:
    """Logs a warning if the user's own source file has changed since a checkpoint was written.

    Without such a file in the architecture, nothing is logged.
    """
    made_by = code_hash(reader, architecture)
    doors.warn_if_changed(architecture.code, made_by, model=str(reader.path))


class _Tensors(Tensors):
    """Weights of a student, each read from the checkpoint's files on access.

    Args:
        reader: The checkpoint.
        shapes: Returns the shape of each tensor by name. Called on first access only, since it may
            import the user's own code.
        absent: See `StoredStudent`. Names that the student does not have are ignored.
    """

    def __init__(
        self,
        reader: Reader,
        shapes: Callable[[], dict[str, stream.Shape]],
        absent: Mapping[str, float],
    ) -> None:
        super().__init__({})
        self._reader, self._shapes, self._absent = reader, shapes, absent

    @cached_property
    def _table(self) -> dict[str, stream.Shape]:
        table = self._shapes()
        stored = {name: shape for name, shape in table.items() if name not in self._absent}
        stream.check(self._reader, stored, prefix=stream.STUDENT)
        return table

    def __getitem__(self, name: str) -> Tensor:
        reader = self._reader
        if name in self._absent:
            return torch.full(self._table[name], self._absent[name])
        name, shape = f"{stream.STUDENT}{name}", self._table[name]
        return stream.read(reader, name, shape, kind=stream.outcome(reader))

    def __iter__(self) -> Iterator[str]:
        return iter(self._table)

    def __len__(self) -> int:
        return len(self._table)

    def shape(self, name: str) -> stream.Shape:
        """Returns the shape of the tensor `name` without reading the tensor."""
        return self._table[name]

    def dtype(self, name: str) -> torch.dtype:
        """Returns float32, the data type of all stored weights, whatever `name` is."""
        return torch.float32
