"""Ranks that are threads of the test's process, and which of them touches which files how often.

A world of any size costs nothing here; `launch.py` starts real ones. Objects travel pickled.
"""

from __future__ import annotations

import contextvars
import os
import pickle
import sys
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch

from fd_large.ranks import distributed

TIMEOUT_SECONDS = 60.0
# None: the test itself.
_rank: contextvars.ContextVar[int | None] = contextvars.ContextVar("rank", default=None)
_worlds: list[World] = []


def _block(number: int) -> slice:
    """The ranks of this rank's group, of so many neighbours each."""
    first = rank() // number * number
    return slice(first, first + number)


class World:
    """Some ranks on some nodes.

    Args:
        patch: Puts them in the place of torch's.
        ranks: Their number.
        ranks_a_node: Ranks on each node.
        below: Folders; what is done to files in them is counted.

    Attributes:
        done: Rank -> operation ("open", "stat", "listdir", "scandir") -> how often, in the last
            `run`.
    """

    def __init__(
        self,
        patch: pytest.MonkeyPatch,
        ranks: int,
        *,
        ranks_a_node: int = 2,
        below: tuple[Path, ...] = (),
    ) -> None:
        self.ranks = ranks
        self._below = tuple(str(folder) for folder in below)
        self.done: list[Counter[str]] = []
        self._slots: list[bytes] = [b""] * ranks
        self._barrier = threading.Barrier(ranks, timeout=TIMEOUT_SECONDS)
        for name, value in {
            "rank": rank,
            "world_size": lambda: ranks,
            "local_rank": lambda: rank() % ranks_a_node,
            "local_world_size": lambda: ranks_a_node,
            "node_name": lambda: f"n{rank() // ranks_a_node}",
            "device": lambda: torch.device("cpu"),
            "gather_objects": self._gather,
            "broadcast_object": lambda value, source=0: self._gather(value)[source],
            "neighbours": lambda number: number,
            "sum_tensor": lambda value, group=None: torch.stack(
                self._gather(value.detach().clone())[_block(group or ranks)]
            ).sum(0),
            "max_rank": lambda value: max(self._gather(value)),
            "barrier": self._barrier.wait,
        }.items():
            patch.setattr(distributed, name, value)
        for name in ("stat", "lstat"):
            patch.setattr(os, name, self._counted(getattr(os, name)))
        if not _worlds:
            sys.addaudithook(_audit)
        _worlds[:] = [self]

    def run(self, work: Callable[[], Any]) -> list[Any]:
        """Does the same on every rank; returns what each got, or raised."""
        self.done = [Counter() for _ in range(self.ranks)]
        self._barrier.reset()
        results: list[Any] = [None] * self.ranks

        def one(rank: int) -> None:
            _rank.set(rank)
            try:
                results[rank] = work()
            except Exception as error:
                results[rank] = error

        threads = [
            threading.Thread(target=contextvars.Context().run, args=(one, rank), daemon=True)
            for rank in range(self.ranks)
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(TIMEOUT_SECONDS)
            assert not thread.is_alive(), "ranks wait for one another"
        return results

    def count(self, operation: str, path: object) -> None:
        """Counts an operation of the present rank, if it is on a file that is watched."""
        with suppress(TypeError):
            name = os.fsdecode(path)
            if _rank.get() is not None and self is _worlds[-1] and name.startswith(self._below):
                self.done[rank()][operation] += 1

    def _gather(self, value: Any) -> list[Any]:
        self._slots[rank()] = pickle.dumps(value)
        self._barrier.wait()
        found = [pickle.loads(slot) for slot in self._slots]
        self._barrier.wait()
        return found

    def _counted(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(path: Any, *args: Any, **options: Any) -> Any:
            self.count("stat", path)
            return function(path, *args, **options)

        return call


def rank() -> int:
    """The rank of this thread; 0 in the test itself."""
    return _rank.get() or 0


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if event in ("open", "os.listdir", "os.scandir"):
        _worlds[-1].count(event.removeprefix("os."), arguments[0])
