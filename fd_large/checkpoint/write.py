"""Writes a checkpoint while training goes on: copy to host memory, then a thread does the rest.

The host memory, 12 bytes for each parameter of the rank's shard and 4 more for an average, is kept
from save to save.

Every rank writes one safetensors file of its shards, so that a run on 1,000 ranks writes 1,000
files of tensors and 1,000 receipts, and no rank writes more than its own. All ranks agree in the
loop's one small all-reduce that all have finished; then rank 0 commits by a rename.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from fd_large import distributed
from fd_large.atomic_files import replacing
from fd_large.checkpoint import store
from fd_large.checkpoint.lease import Lease

log = logging.getLogger(__name__)


class Piece(NamedTuple):
    """This rank's shard of one tensor of the state.

    Attributes:
        key: KIND.NAME, KIND master, ema, or a moment of the optimiser, such as exp_avg.
        values: (elements,) float32, a view of the live state.
    """

    key: str
    values: Tensor


def _mask() -> int:
    mask = os.umask(0o22)
    os.umask(mask)
    return mask


class Saver:
    """Writes one checkpoint at a time, from `begin` to `finish`.

    Args:
        folder: The run's folder.
        keep_last: Newest complete checkpoints that stay.
        keep_every: Steps whose multiples stay as well; 0 keeps none of them.
        lease: This start's right to write the folder; None where nobody else can be.
    """

    def __init__(
        self, folder: Path, *, keep_last: int, keep_every: int, lease: Lease | None = None
    ) -> None:
        self.folder, self.keep_last, self.keep_every = folder, keep_last, keep_every
        self._lease = lease
        self._thread: threading.Thread | None = None
        self._pruner: threading.Thread | None = None
        self._problem: str | None = None
        self._manifest: dict[str, Any] = {}
        self._part = Path()
        self._buffers: dict[str, Tensor] = {}
        self.ended = 0.0
        """When this rank had written its file, by time.monotonic."""
        self.stall_seconds = 0.0
        """How long training stood still for the last `begin`."""

    @property
    def begun(self) -> bool:
        """Whether a checkpoint is under way."""
        return self._thread is not None

    @property
    def busy(self) -> bool:
        """Whether this rank still writes."""
        return self._thread is not None and self._thread.is_alive()

    @property
    def failed(self) -> bool:
        """Whether this rank could not write what it should have."""
        return self._problem is not None

    def begin(self, manifest: dict[str, Any], pieces: Iterable[Piece]) -> None:
        """Copies the state to host memory and starts to write it; blocks for the copy only."""
        assert not self.begun
        start = time.perf_counter()
        self.close()
        self._manifest, self._problem = manifest, None
        self._part = store.part_of(self.folder, manifest["update"], self._lease)
        copies = {key: self._copied(key, values.detach()) for key, values in pieces}
        self._thread = threading.Thread(target=self._write, args=(copies,), name="checkpoint")
        self._thread.start()
        self.stall_seconds = time.perf_counter() - start

    def _copied(self, key: str, values: Tensor) -> Tensor:
        # Host memory that stays for the next save: fresh pages cost as much as the copy.
        buffer = self._buffers.get(key)
        if buffer is None or buffer.shape != values.shape:
            buffer = torch.empty(
                values.shape, dtype=values.dtype, pin_memory=values.device.type == "cuda"
            )
            self._buffers[key] = buffer
        return buffer.copy_(values)

    def wait(self) -> None:
        """Blocks until this rank has written."""
        if self._thread is not None:
            self._thread.join()

    def finish(self, *, failed_anywhere: bool) -> bool:
        """Commits, or throws away if any rank failed; all ranks call it when none is busy.

        Returns: whether the checkpoint is complete now.
        """
        self.wait()
        self._thread = None
        if not failed_anywhere and distributed.is_main():
            try:
                final = store.commit(self._part, self._manifest, self._lease)
                log.info("checkpoint: %s", final)
            except OSError as error:
                self._problem = str(error)
        if self._problem:
            log.error("CHECKPOINT NOT WRITTEN on rank %d: %s", distributed.rank(), self._problem)
        # All ranks count the same failures.
        written = distributed.broadcast_object(not failed_anywhere and not self._problem)
        if distributed.is_main():
            if written:
                # Removing takes long for large files: beside training, done before the next save.
                self._pruner = threading.Thread(target=self._prune, name="prune")
                self._pruner.start()
            else:
                shutil.rmtree(self._part, ignore_errors=True)
                log.error(
                    "CHECKPOINT of step %d was thrown away; the ones before it stay. Make room in "
                    "%s.",
                    self._manifest["update"],
                    self.folder,
                )
        self._problem = None
        return written

    def close(self) -> None:
        """Waits until old checkpoints are removed."""
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
        except OSError as error:
            log.warning("old checkpoints stay: %s", error)

    def _write(self, copies: dict[str, Tensor]) -> None:
        rank = distributed.rank()
        path = self._part / store.file_of(rank)
        try:
            self._part.mkdir(parents=True, exist_ok=True)
            # A rank without a shard writes a file too: safetensors can hold no tensors at all.
            save_file(copies, path)
            # safetensors makes it readable to its owner alone, whatever the user's umask is.
            path.chmod(0o666 & ~_mask())
            with path.open("rb") as file:
                os.fsync(file.fileno())
            receipt = {"bytes": path.stat().st_size, "crc32": store.checksum(path)}
            with replacing(self._part / store.receipt_of(rank)) as aside:
                aside.write_text(json.dumps(receipt))
        except Exception as error:  # Whatever it was, this rank's file is not there.
            self._problem = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"
            # Frees the disk for the other ranks, and for what training itself writes.
            path.unlink(missing_ok=True)
        finally:
            self.ended = time.monotonic()
