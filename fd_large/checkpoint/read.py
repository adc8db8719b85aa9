"""Reads a stored state on any number of ranks: only the slices that this rank needs."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from fd_large import distributed
from fd_large.checkpoint import layout as layouts
from fd_large.checkpoint import store
from fd_large.checkpoint.layout import Span

TRIES = 4
SECONDS_BETWEEN_TRIES = 1.0


class Reader:
    """Slices of a complete checkpoint.

    Args:
        stored: The checkpoint.
        sound: Stored ranks whose files were checked against their receipts.

    Attributes:
        path: The checkpoint's folder.
        manifest: Content of its manifest.json.
        layout: How the state lies in the files.
    """

    def __init__(self, stored: store.Stored, sound: set[int]) -> None:
        self.path, self.manifest = stored.path, stored.manifest
        self.layout = layouts.from_dict(self.manifest["layout"])
        self._sound = sound
        # Files stay mapped while slices are taken; a handful covers neighbouring shards.
        self._open = lru_cache(maxsize=8)(self._map)

    def read(self, kind: str, name: str, start: int, stop: int) -> Tensor:
        """Returns elements [start, stop) of a flattened tensor, (stop - start,) float32.

        Args:
            kind: master, ema, or one of the optimiser's moments (exp_avg, exp_avg_sq).
            name: The stored tensor.
            start: First element.
            stop: Element after the last.
        """
        parts = []
        for rank in self.layout.holders(name, Span(start, stop)):
            held = self.layout.span(rank, name)
            first, last = max(start, held.start), min(stop, held.stop)
            if first < last:
                stored = self._open(rank).get_slice(f"{kind}.{name}")
                parts.append(stored[first - held.start : last - held.start])
        return torch.cat(parts) if parts else torch.empty(0)

    def _map(self, rank: int) -> Any:
        assert rank in self._sound, f"{self.path}: rank {rank}'s file was not checked"
        return safe_open(self.path / store.file_of(rank), framework="pt")


def newest_sound(
    folder: Path,
    needs: Callable[[layouts.Layout], set[int]],
    *,
    at_most: int | None = None,
) -> tuple[Reader | None, list[str]]:
    """Returns the newest checkpoint that is sound for every rank, and what newer ones lacked.

    All ranks call it and get the same answer; each checks the files that it is going to read.

    Args:
        folder: The run's folder.
        needs: Layout -> the stored ranks whose files this rank reads.
        at_most: Steps of the newest checkpoint that may be taken; None takes any.
    """
    complaints: list[str] = []
    # Rank 0 lists and reads manifests for all: another node's view of a shared disk may be old.
    names = distributed.broadcast_object(
        [
            path.name
            for path in store.renamed(folder)
            if at_most is None or path.name <= store.name_of(at_most)
        ]
    )
    for name in reversed(names):
        path = store.checkpoints_of(folder) / name
        manifest = distributed.broadcast_object(
            store.manifest_of(path) if distributed.is_main() else None
        )
        wanted: set[int] = set()
        problem = f"{path}: manifest.json is missing or damaged"
        if manifest is not None:
            wanted = needs(layouts.from_dict(manifest["layout"]))
            found = (_damage(path, rank) for rank in sorted(wanted))
            problem = next((f"{path}: {p}" for p in found if p), "")
        problems = [p for p in distributed.gather_objects(problem) if p]
        if not problems:
            item = store.Stored(path, manifest)
            if distributed.is_main():
                # Or else they would count among the newest that stay.
                store.set_aside(folder, names[names.index(name) + 1 :])
            return Reader(item, wanted), complaints
        complaints.append(problems[0])
    return None, complaints


def _damage(path: Path, rank: int) -> str | None:
    """As `store.damage`, but an error may pass, and files of another node take time to appear."""
    for _ in range(TRIES - 1):
        if store.damage(path, rank) is None:
            return None
        time.sleep(SECONDS_BETWEEN_TRIES)
        os.listdir(path.parent)  # Makes a network file system ask its server again.
    return store.damage(path, rank)
