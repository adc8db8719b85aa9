"""A second rank, without a process, for tests of gradients on their way to the optimiser."""

from types import SimpleNamespace

import pytest

from fd_large.engine.zero.start import deepspeed
from fd_large.ranks import distributed


@pytest.fixture
def twin_rank(monkeypatch):
    """A second rank with the same gradients; gives the sizes that were reduced, in order."""
    sizes = []

    def all_reduce(tensor, group=None, async_op=False):
        sizes.append(tensor.numel())
        tensor.mul_(2)
        return SimpleNamespace(wait=lambda: None)

    def reduce(tensor, dst, async_op):
        sizes.append((dst, tensor.numel()))
        # Whoever does not own a sum is left with numbers that mean nothing.
        tensor.mul_(2 if dst == distributed.rank() else float("nan"))
        return SimpleNamespace(wait=lambda: None)

    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    monkeypatch.setattr(deepspeed.comm, "all_reduce", all_reduce)
    monkeypatch.setattr(deepspeed.comm, "reduce", reduce)
    return sizes
