"""Reads from a checkpoint the slices of tensors that a rank needs, on any number of ranks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from fd_large.checkpoint import layout as layouts
from fd_large.checkpoint import store
from fd_large.checkpoint.layout import Span
from fd_large.checkpoint.tensor_file import Place, TensorFile
from fd_large.errors import CheckpointError, FDError, StorageError
from fd_large.files import retried
from fd_large.ranks import distributed

TRIES = 4
SECONDS_BETWEEN_TRIES = 1.0
DESCRIPTORS_LEFT = 256
"""Number of file descriptors that are left free for other uses than files of a checkpoint."""

T = TypeVar("T")


class Reader:
    """Reads slices of tensors of a complete checkpoint.

    A file stays open after its first use, as far as the limit of open files allows.

    Args:
        stored: The checkpoint.
        kinds: Kinds of tensors that may be read, since their checksums were compared: "master",
            "ema", or a moment of the optimiser (see `read`); None for all kinds.

    Attributes:
        path: The checkpoint's folder.
        manifest: Contents of the checkpoint's manifest.json.
        layout: Layout of the tensors in the files of the ranks.
    """

    def __init__(self, stored: store.Stored, kinds: Collection[str] | None = None) -> None:
        self.path, self.manifest = stored.path, stored.manifest
        self.layout = layouts.from_dict(self.manifest["layout"])
        self._kinds = kinds
        self._files: dict[int, TensorFile] = {}
        self._headers: dict[bytes, dict[str, Place]] = {}
        # A command that starts no ranks has not raised its limit yet.
        _, most = distributed.raise_open_files()
        self._most = max(1, most - DESCRIPTORS_LEFT)

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Returns elements [start, stop) of a flattened tensor, (stop - start,) float32.

        Args:
            kind: "master" for master weights, "ema" for averaged weights, or a moment of the
                optimiser ("exp_avg", "exp_avg_sq").
            name: Name of the tensor.
            start: Index of the first element.
            stop: Index after the last element.

        Raises:
            FileNotFoundError: if a file no longer exists.
            StorageError: if the file system does not answer.
            CheckpointError: if a file cannot be read for another reason.
        """
        assert self._kinds is None or kind in self._kinds, f"{self.path}: {kind} was not checked"
        values = torch.empty(max(0, stop - start))
        for rank in self.layout.holders(name, Span(start, stop)):
            stored_span = self.layout.span(rank, name)
            first, last = max(start, stored_span.start), min(stop, stored_span.stop)
            if first < last:
                part = values[first - start : last - start]
                self._read(rank, part, f"{kind}.{name}", first - stored_span.start)
        return values

    def _read(self, rank: int, part: Tensor, name: str, first: int) -> None:
        path = self.path / store.file_of(rank)

        def read() -> None:
            file = self._files.pop(rank, None) or TensorFile(path, self._headers)
            try:
                file.read_into(part, name, first)
            except OSError:
                # The next try asks the server anew: a file that was replaced is stale for ever.
                file.close()
                raise
            if len(self._files) < self._most:
                self._files[rank] = file
            else:
                file.close()

        try:
            retried(read, path)
        except FileNotFoundError:
            raise
        except (OSError, ValueError) as error:
            raise CheckpointError(
                f"{path}: cannot be read; got {error}, expected the file that was checked. Start "
                "the same command again: it checks all files."
            ) from error


def on_main(action: Callable[[], T]) -> T:
    """Calls `action` on rank 0 alone, and returns its result on all ranks.

    All ranks must call this function.

    Raises:
        FDError: on all ranks, if `action` raises an FDError or an OSError; an OSError becomes a
            CheckpointError.
    """

    def told() -> T:
        try:
            return action()
        except OSError as error:
            raise CheckpointError(
                f"{error.filename}: cannot be changed; got {error.strerror}, expected a folder of "
                "checkpoints that this user may change. Correct its permissions."
            ) from error

    return distributed.of_main(told)


def newest_sound(folder: Path, *, at_most: int | None = None) -> tuple[Reader | None, list[str]]:
    """Finds the newest checkpoint without damage, and renames newer ones, which are damaged.

    Renamed checkpoints stay for inspection (`store.set_aside`). If all checkpoints are damaged,
    none is renamed. All ranks must call this function. Each file is checked by one rank. A
    checkpoint counts as damaged only if rank 0 also finds the damage, since a read error of one
    rank is not damage.

    Args:
        folder: The run's folder.
        at_most: Step after which checkpoints are ignored and not renamed; None for no limit.

    Returns: a reader of the checkpoint, or None if there is none without damage; a message about
        each damaged checkpoint that is newer.
    Raises: StorageError, CheckpointError: on all ranks, if a checkpoint cannot be read for now.
    """
    complaints: list[str] = []
    # Rank 0 lists and reads manifests for all: another node's view of a shared disk may be old.
    names = on_main(
        lambda: [
            path.name
            for path in store.renamed(folder)
            if at_most is None or path.name <= store.name_of(at_most)
        ]
    )
    for name in reversed(names):
        path = store.checkpoints_of(folder) / name
        manifest = on_main(partial(store.manifest_of, path))
        problem = f"{path}: manifest.json is missing or damaged"
        if manifest is not None:
            problem = _problem(path, manifest["world_size"])
        if manifest is not None and not problem:
            newer = names[names.index(name) + 1 :]
            # Otherwise they would count among the newest checkpoints, which are kept.
            on_main(partial(store.set_aside, folder, newer))
            return Reader(store.Stored(path, manifest)), complaints
        complaints.append(problem)
    return None, complaints


def _problem(path: Path, files: int) -> str:
    """Checks a checkpoint's files, of which each rank checks a part.

    All ranks must call this function.

    Args:
        path: The checkpoint's folder.
        files: Number of files of tensors in the checkpoint.

    Returns: a message about the damage if rank 0 finds it too, or "" if no rank finds damage.

    Raises:
        StorageError: on all ranks, if a rank finds damage in a file in which rank 0 finds none.
    """
    world, rank = distributed.world_size(), distributed.rank()

    def first_damaged() -> tuple[int, str] | None:
        # Each rank checks files near those that it will read, which are then in its host's cache.
        near_files = (file for file in range(files) if file * world // files == rank)
        return next(((file, p) for file in near_files if (p := damage(path, file))), None)

    damages = distributed.gather_objects(distributed.together(first_damaged))
    suspects = [(rank, *item) for rank, item in enumerate(damages) if item]
    for _, file, _ in suspects:
        if again := on_main(partial(damage, path, file)):
            return f"{path}: {again}"
    for rank, _, problem in suspects:
        error: FDError = StorageError(
            f"{path}: ranks read different contents; got on rank {rank}: {problem}, expected the "
            "sound files that rank 0 reads. Start the same command again; if the error repeats, "
            "check the file system of that rank's node."
        )
        error.agreed = True
        raise error
    return ""


def damage(path: Path, rank: int, kinds: Collection[str] | None = None) -> str | None:
    """Checks a rank's file of tensors in a checkpoint, up to `TRIES` times while it finds damage.

    The check is repeated because on a network file system the files of another node may take time
    to appear.

    Args:
        path: The checkpoint's folder.
        rank: The rank that wrote the file.
        kinds: Kinds of tensors whose bytes are checked, such as "master" (master weights) or "ema"
            (averaged weights); None to check the whole file.

    Returns: a message about the damage, or None if there is none.
    Raises: StorageError, CheckpointError: if a file exists but cannot be read, which is no damage.
    """
    for _ in range(TRIES - 1):
        if store.damage(path, rank, kinds) is None:
            return None
        time.sleep(SECONDS_BETWEEN_TRIES)
        try:
            os.listdir(path)  # Makes a network file system ask its server again.
        except FileNotFoundError:
            break  # The run still trains, and has removed it meanwhile.
        except OSError:
            continue
    return store.damage(path, rank, kinds)
