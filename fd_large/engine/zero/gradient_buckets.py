"""Cuts gradients into buckets, and sums the buckets over ranks during backward.

All ranks send the buckets in the same order, each when its gradients are complete.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from torch import Tensor

from fd_large.engine.zero.start import deepspeed
from fd_large.plan.buckets import MOST_OWNERS
from fd_large.ranks import distributed

MOST_COPIES = 2
"""Largest number of buckets that are summed at a time, each in memory of its own."""


def sums_have_owners() -> bool:
    """Returns whether a bucket's sum is sent to its owner only: with up to `MOST_OWNERS` ranks."""
    return distributed.world_size() <= MOST_OWNERS


def cuts(size: int, bucket: int) -> list[tuple[int, int, int | None]]:
    """Cuts a flat group of `size` gradient elements into buckets of at most `bucket` elements.

    Returns (begin, end, owner) of each bucket. The owner is the rank that needs the bucket's sum,
    or None if all ranks get it.
    """
    world = distributed.world_size()
    if not sums_have_owners():
        return [(begin, min(begin + bucket, size), None) for begin in range(0, size, bucket)]
    shard = size // world
    return [
        (owner * shard + start, owner * shard + min(start + bucket, shard), owner)
        for owner in range(world)
        for start in range(0, shard, bucket)
    ]


def start_sum(sent: Tensor, owner: int | None) -> Any:
    """Starts to sum `sent` over the ranks, in place, and returns the unfinished work.

    The sum is made on the rank `owner`, or on all ranks if it is None.
    """
    if owner is None:
        return deepspeed.comm.all_reduce(sent, async_op=True)
    return deepspeed.comm.reduce(sent, owner, async_op=True)


class InOrder(ABC):
    """Sends buckets of gradients in the same order on all ranks.

    A bucket is sent when all its gradients and those of the earlier buckets are complete. `needs`
    gives the number of gradients of each bucket; buckets are numbered in the order of sending.
    """

    def __init__(self, needs: Sequence[int]) -> None:
        self._needs = needs
        # The buckets in flight, the oldest first.
        self._works: list[tuple[Any, ...]] = []
        self._begin()

    def _begin(self) -> None:
        self._missing, self._next = list(self._needs), 0

    def arrived(self, bucket: int) -> None:
        """Counts a complete gradient of a bucket; sends the buckets that are next and complete."""
        assert bucket >= self._next, "a gradient came after its bucket was sent"
        self._missing[bucket] -= 1
        while self._next < len(self._needs) and self._missing[self._next] == 0:
            self._start(self._next)
            self._next += 1

    def finish(self) -> None:
        """Sends the remaining buckets, waits for all buckets, and resets the counts."""
        for bucket in range(self._next, len(self._needs)):
            self._start(bucket)
        while self._works:
            self._settle()
        self._begin()

    @abstractmethod
    def _start(self, bucket: int) -> None:
        """Starts to sum a bucket over the ranks."""

    @abstractmethod
    def _settle(self) -> None:
        """Waits for the oldest unfinished sum of a bucket."""


class Reductions(InOrder):
    """Sums buckets of gradients over the ranks, in place.

    Args:
        engine: DeepSpeed's engine, which decides the data type that is sent.
        buckets: Tensors to sum, in the order in which they are sent.
        needs: See `InOrder`.
        owners: For each bucket the rank that needs its sum, or None if all ranks need it. On ranks
            that do not need it, the bucket's content is undefined afterwards.
    """

    def __init__(
        self,
        engine: Any,
        buckets: Sequence[Tensor],
        needs: Sequence[int],
        owners: Sequence[int | None],
    ) -> None:
        super().__init__(needs)
        self._engine, self._buckets, self._owners = engine, buckets, owners

    def _start(self, bucket: int) -> None:
        if distributed.world_size() == 1:
            return
        gradients = self._buckets[bucket]
        dtype = self._engine.communication_data_type
        if gradients.dtype != dtype and len(self._works) == MOST_COPIES:
            self._settle()
        sent = gradients.to(dtype)
        owner = self._owners[bucket]
        self._works.append((start_sum(sent, owner), sent, gradients, owner))

    def _settle(self) -> None:
        work, sent, gradients, owner = self._works.pop(0)
        work.wait()
        if sent is not gradients and owner in (None, distributed.rank()):
            gradients.copy_(sent)
