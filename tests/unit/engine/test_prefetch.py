"""The next micro batch's copy runs beside the present one; stand-ins for CUDA's streams."""

from contextlib import contextmanager

import pytest
import torch

from fd_large.data.loader import Batch
from fd_large.engine.prefetch import Prefetch


def batches(count):
    for number in range(count):
        positions = torch.tensor([number])
        yield Batch(torch.full((1, 3, 2, 2), number, dtype=torch.uint8), 0, positions, positions)


def test_without_a_gpu_nothing_is_fetched_ahead():
    taken = []
    source = (taken.append(batch) or batch for batch in batches(3))
    prefetch = Prefetch(source, torch.device("cpu"))
    batch, computed = next(prefetch)
    assert computed.images is batch.images
    prefetch.stage()
    assert len(taken) == 1
    assert [int(batch.positions) for batch, _ in prefetch] == [1, 2]


@pytest.fixture
def cuda(monkeypatch):
    """Notes in which order copies are made and waited for."""
    notes = []

    class Stream:
        def __init__(self, name):
            self.name = name

        def wait_stream(self, other):
            notes.append(f"{self.name} waits for {other.name}")

    class Images:
        def __init__(self, number, where="host"):
            self.number, self.where = number, where

        def to(self, device, non_blocking):
            assert non_blocking
            notes.append(f"copy {self.number} on {current[-1].name}")
            return Images(self.number, "device")

        def record_stream(self, stream):
            assert self.where == "device"
            notes.append(f"{self.number} used on {stream.name}")

    @contextmanager
    def entered(stream):
        current.append(stream)
        yield
        current.pop()

    current = [Stream("main")]
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: Stream("side"))
    monkeypatch.setattr(torch.cuda, "stream", entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current[-1])
    positions = torch.zeros(1)
    source = (Batch(Images(number), 0, positions, positions) for number in range(3))
    return Prefetch(source, torch.device("cuda", 0)), notes


def test_on_a_gpu_the_next_copy_is_waited_for_by_the_stream_that_computes(cuda):
    prefetch, notes = cuda
    host, device = next(prefetch)
    assert (host.images.where, device.images.where) == ("host", "device")
    prefetch.stage()
    prefetch.stage()  # Never two ahead.
    assert notes == ["copy 0 on main", "copy 1 on side"]
    host, device = next(prefetch)
    assert (host.images.where, device.images.where) == ("host", "device")
    assert notes[2:] == ["main waits for side", "1 used on main"]
    prefetch.stage()
    assert [host.images.number for host, _ in prefetch] == [2]
    prefetch.stage()  # At the end there is nothing to stage.
    assert next(prefetch, None) is None
