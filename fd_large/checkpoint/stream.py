"""Reads the weights in a checkpoint as full tensors, one tensor at a time.

Neither a process group nor an engine is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from torch import Tensor

from fd_large.checkpoint import store
from fd_large.checkpoint.read import Reader, damage, on_main
from fd_large.errors import CheckpointError
from fd_large.files import kind_of, retried
from fd_large.ranks import activity, distributed

STUDENT = "student."

Shape = tuple[int, ...]


def newest(folder: Path, *, where: str = "checkpoint") -> Reader:
    """Opens a run's newest checkpoint, and checks the bytes of the weights in it.

    If this checkpoint is damaged, no older checkpoint is used in its place, since its weights
    differ: the user must name the older checkpoint. (Training resumes from the older checkpoint by
    itself; see `read.newest_sound`.)

    Only the kind of weights that `outcome` returns is checked and can be read. Nothing is written,
    as the run may be another user's. The function is not a collective. With several ranks, only
    rank 0 checks bytes, and other ranks must be given the path of rank 0's checkpoint, since a
    training run may write a newer checkpoint in between (`newest_of_main`).

    Args:
        folder: The run's folder, or the folder of one of its checkpoints.
        where: Name of the configuration field or argument with this folder, for messages.

    Raises:
        CheckpointError: if there is no checkpoint, or the newest checkpoint is damaged.
        StorageError: if the checkpoint cannot be read for now.
    """
    manifest = store.manifest_of(folder)
    damaged: list[str] = []
    for path in reversed(store.renamed(folder)) if manifest is None else [folder]:
        problem: str | None = "manifest.json is missing or damaged"
        if (manifest := store.manifest_of(path)) is not None:
            stored, kind = store.Stored(path, manifest), _outcome(manifest)
            problem = _problem(stored, kind) if distributed.is_main() else None
            if problem is None and not damaged:
                return Reader(stored, {kind})
        if problem is None:
            raise CheckpointError(
                f"{where}: {folder}: its newest checkpoint is damaged; got {'; '.join(damaged)}, "
                "expected complete files. Restore the files, or name the previous checkpoint: "
                f"{path}."
            )
        if kind_of(path):  # Otherwise a run that trains has pruned it.
            damaged.append(f"{path.name}: {problem}")
    raise CheckpointError(
        f"{where}: {folder}: no sound checkpoint; got "
        f"{'; '.join(damaged) or 'no complete checkpoint'}, expected a complete checkpoint. Train "
        "the run first, or restore the files of a checkpoint."
    )


def newest_of_main(folder: Path, *, where: str = "checkpoint") -> Reader:
    """Returns, on each rank, a reader of the same checkpoint, which rank 0 finds by `newest`.

    All ranks must call this function.

    Args:
        folder: The run's folder, or the folder of one of its checkpoints.
        where: Name of the configuration field or argument with this folder, for messages.

    Raises: FDError: on all ranks, if `newest` raises an error.
    """
    path = on_main(lambda: newest(folder, where=where).path)
    return newest(path, where=where)


def _problem(stored: store.Stored, kind: str) -> str | None:
    try:
        states = retried(
            lambda: [(path.name, path.stat()) for path in sorted(stored.path.iterdir())],
            stored.path,
        )
        stamps = tuple((name, state.st_size, state.st_mtime_ns) for name, state in states)
        return _problem_of(stored.path, stored.manifest["world_size"], kind, stamps)
    except FileNotFoundError as error:
        return f"removed while it was read ({error})"


@lru_cache
def _problem_of(path: Path, ranks: int, kind: str, stamps: tuple) -> str | None:
    # Files of the same size and time were checked before.
    files = activity.counted(range(ranks), f"checking {path.name}", "files")
    return next((p for rank in files if (p := damage(path, rank, {kind}))), None)


def outcome(reader: Reader) -> str:
    """Returns the kind of weights that are the result of the run with the checkpoint `reader`.

    The kind is "ema" if the run keeps a moving average of the weights, else "master".
    """
    return _outcome(reader.manifest)


def _outcome(manifest: Mapping[str, Any]) -> str:
    return "ema" if manifest.get("ema") else "master"


def read(reader: Reader, name: str, shape: Shape, *, kind: str = "master") -> Tensor:
    """Reads a full tensor of a checkpoint, as float32.

    Args:
        reader: The checkpoint.
        name: Name of the tensor in the checkpoint.
        shape: Shape of the tensor.
        kind: Kind of weights, "master" or "ema".

    Raises:
        CheckpointError: if a file of the checkpoint cannot be read, or no longer exists because a
            training run has pruned the checkpoint.
    """
    try:
        return reader.read(kind, name, 0, math.prod(shape)).view(shape)
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{reader.path}: a file has disappeared; got {error}, expected the file that was "
            "there before. If the run prunes checkpoints, use a newer checkpoint."
        ) from error


def check(reader: Reader, shapes: Mapping[str, Shape], *, prefix: str = "") -> None:
    """Checks that the tensors in a checkpoint have the names and sizes of a model's tensors.

    Args:
        reader: The checkpoint.
        shapes: Shapes of the model's tensors, by name.
        prefix: Text in front of the model's names in the checkpoint, such as "student."; tensors
            in the checkpoint without this text are ignored.

    Raises: CheckpointError: if names or sizes differ.
    """
    sizes = reader.layout.sizes
    stored = {n.removeprefix(prefix): s for n, s in sizes.items() if n.startswith(prefix)}
    expected = {name: math.prod(shape) for name, shape in shapes.items()}
    wrong = sorted(n for n in stored.keys() | expected.keys() if stored.get(n) != expected.get(n))
    if wrong:
        raise CheckpointError(
            f"{reader.path}: does not match the model in recipe.json; got {len(wrong)} tensors "
            f"that differ ({', '.join(wrong[:3])}{', ...' if len(wrong) > 3 else ''}), expected "
            f"the {len(expected)} tensors of the recipe. Restore the recipe.json of the run."
        )
