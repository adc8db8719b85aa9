"""Writes a checkpoint while training goes on, by a thread, from a copy in host memory.

The host memory for the copy is kept from save to save. The copy takes 12 bytes for each parameter
of the rank's shard, and 4 bytes more if the run keeps a moving average. State that lies in files on
a disk, because there is no memory for it, is not copied, but written from the disk while training
pauses; the resulting checkpoint is the same to the byte.

Every rank writes one safetensors file of its own shards and one receipt, so that a run on 1,000
ranks writes 1,000 files of tensors and 1,000 receipts. In the small all-reduce that the training
loop makes anyway, the ranks learn that all of them have finished. Then rank 0 commits the
checkpoint by a rename.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import accumulate
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fd_large.checkpoint import store, tensor_file
from fd_large.checkpoint.lease import Lease
from fd_large.errors import FDError
from fd_large.files import replacing, retried
from fd_large.ranks import distributed

log = logging.getLogger(__name__)


class Piece(NamedTuple):
    """This rank's shard of a tensor of the state.

    Attributes:
        key: KIND.NAME, where KIND is "master", "ema", or a moment of the optimiser such as
            "exp_avg", and NAME is the name of the parameter.
        values: (num_elements,) float32, a view of the live state.
    """

    key: str
    values: Tensor


def in_words(keys: Sequence[str]) -> str:
    """Describes the shards with these keys, as in "master of student.norm.weight, and 3 more,".

    Args:
        keys: Keys of the shards, at least one, in the form KIND.NAME.
    """
    kind, _, name = keys[0].partition(".")
    return f"{kind} of {name}" + (f", and {len(keys) - 1} more," if len(keys) > 1 else "")


ALIGNMENT = 64
"""Alignment in bytes of each tensor in the copy, so that the tensor can be of any data type."""


class Saver:
    """Writes one checkpoint at a time, from `begin` to `finish`.

    Args:
        folder: The run's folder.
        keep_last: Number of newest complete checkpoints to keep.
        keep_every: Checkpoints whose step is a multiple of this number are also kept; 0 for none.
        lease: The right of this launch of the run to write the folder; None if no other process can
            write the folder.
        copies: Whether the state is copied, so that training can continue during the write. If
            False, the state is written without a copy, and must not change until `wait` has
            returned.

    Attributes:
        begun: Whether a checkpoint was begun and not yet finished.
        not_finite: Keys of this rank's shards with NaN or infinity, because of which the last
            checkpoint was not written.
        ended: Time at which this rank finished or failed to write its file, by time.monotonic.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        keep_every: int,
        lease: Lease | None = None,
        copies: bool = True,
    ) -> None:
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self._lease, self._copies = lease, copies
        self._thread: threading.Thread | None = None
        self._pruner: threading.Thread | None = None
        self._problem: str | None = None
        self.begun, self._prunes = False, True
        self.not_finite: Sequence[str] = ()
        self._manifest: dict[str, Any] = {}
        self._part = Path()
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self.ended = 0.0
        """Time at which this rank finished or failed to write its file, by time.monotonic."""

    @property
    def busy(self) -> bool:
        """Whether this rank is still writing its file."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether this rank wrote no file because of an error or a non-finite state."""
        return self._problem is not None

    def begin(
        self,
        manifest: dict[str, Any],
        pieces: Iterable[Piece],
        *,
        not_finite: Sequence[str] = (),
        prunes: bool = True,
    ) -> None:
        """Copies the state to host memory, and starts a thread that writes the copy.

        The method returns after the copy. With `copies` False, the thread writes the state itself.
        If the state is not finite, nothing is written, and this rank counts as failed.

        Args:
            manifest: Contents of manifest.json, without its own checksum.
            pieces: This rank's shards.
            not_finite: Keys of this rank's shards that have NaN or infinity.
            prunes: Whether old checkpoints are removed when this checkpoint is complete.
        """
        assert not self.begun
        self.close()
        self.begun, self._manifest, self._problem, self._prunes = True, manifest, None, prunes
        self._part = store.part_of(self.folder, manifest["update"], self._lease)
        self.not_finite = not_finite
        if not_finite:
            self._problem = f"{in_words(not_finite)} is not finite"
            self.ended = time.monotonic()
            return
        detached = [Piece(key, values.detach()) for key, values in pieces]
        # Running statistics are on the device; they are small.
        tensors = self._copied(detached) if self._copies else {key: t.cpu() for key, t in detached}
        self._thread = threading.Thread(target=self._write, args=(tensors,), name="checkpoint")
        self._thread.start()

    def _copied(self, pieces: list[Piece]) -> dict[str, Tensor]:
        # One piece of host memory, kept for the next save: fresh pages cost as much as a copy, and
        # each pinned allocation is a driver call whose size is rounded up by far.
        widths = (-(-values.nbytes // ALIGNMENT) * ALIGNMENT for _, values in pieces)
        *begins, size = accumulate(widths, initial=0)
        if self._buffer.numel() != size:
            self._buffer = torch.empty(0, dtype=torch.uint8)  # The old one goes first.
            pinned = any(values.device.type == "cuda" for _, values in pieces)
            self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=pinned)
        copies = {}
        for (key, values), begin in zip(pieces, begins, strict=True):
            copy = self._buffer[begin : begin + values.nbytes].view(values.dtype)
            copies[key] = copy.copy_(values)
        return copies

    def wait(self) -> None:
        """Blocks until this rank no longer writes its file."""
        if self._thread is not None:
            self._thread.join()

    def finish(self, *, failed_anywhere: bool, broken_anywhere: bool = False) -> bool:
        """Commits the checkpoint, or discards it if any rank failed to write its file.

        All ranks must call this method, when no rank is writing any more.

        Args:
            failed_anywhere: Whether any rank failed, for whatever reason.
            broken_anywhere: Whether any rank failed because its state is not finite.

        Returns: whether the checkpoint is complete, the same on all ranks.
        """
        self.wait()
        self._thread, self.begun = None, False
        if not failed_anywhere and distributed.is_main():
            try:
                final = store.commit(self._part, self._manifest, self._lease)
                log.info("checkpoint: %s", final)
            except (OSError, FDError) as error:
                self._problem = str(error)
        if self._problem:
            log.error("CHECKPOINT NOT WRITTEN on rank %d: %s", distributed.rank(), self._problem)
        # All ranks count the same failures.
        written = distributed.broadcast_object(not failed_anywhere and not self._problem)
        if distributed.is_main():
            if written and self._prunes:
                # Removing takes long for large files: beside training, done before the next save.
                self._pruner = threading.Thread(target=self._prune, name="prune")
                self._pruner.start()
            elif not written:
                store.remove(self._part)
                log.error(
                    "CHECKPOINT of step %d was discarded; earlier checkpoints are kept. %s",
                    self._manifest["update"],
                    "No run can resume from non-finite numbers."
                    if broken_anywhere
                    else f"Make room in {self.folder}.",
                )
        self._problem = None
        return written

    def close(self) -> None:
        """Blocks until the thread that removes old checkpoints has ended."""
        if self._pruner is not None:
            self._pruner.join()
            self._pruner = None

    def _prune(self) -> None:
        try:
            store.prune(
                self.folder,
                keep_last=self.keep_last,
                keep_every=self.keep_every,
                lease=self._lease,
            )
        except (OSError, FDError) as error:
            log.warning("old checkpoints could not be removed: %s", error)

    def _write(self, tensors: dict[str, Tensor]) -> None:
        rank = distributed.rank()
        path = self._part / store.file_of(rank)

        def write() -> None:
            # Not the run's folder: it may have been moved.
            self._part.parent.mkdir(exist_ok=True)
            self._part.mkdir(exist_ok=True)
            # A rank without a shard writes a file too, of no tensors.
            sums = tensor_file.write(path, tensors)
            receipt = {
                "bytes": path.stat().st_size,
                "crc32": sums.file,
                "header": sums.header,
                "kinds": sums.kinds,
            }
            with replacing(self._part / store.receipt_of(rank)) as aside:
                aside.write_text(json.dumps(receipt))

        try:
            # A retry writes the whole file, as an error leaves unknown bytes in file and cache.
            retried(write, path)
        except Exception as error:  # Whatever it was, this rank's file is not there.
            self._problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            # Frees the disk for the other ranks, and for what training itself writes.
            with suppress(OSError):
                path.unlink(missing_ok=True)
        finally:
            self.ended = time.monotonic()
