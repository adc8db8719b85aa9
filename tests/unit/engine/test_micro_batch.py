import re

import pytest
import torch

from fd_large.engine import micro_batch


class FakeMemory:
    """Peak = base + slope * size, without a device."""

    def __init__(self, base, slope, capacity):
        self.base, self.slope, self.room, self.size = base, slope, capacity, 0

    def reset(self):
        self.size = 0

    def peak(self):
        return self.base + self.slope * self.size

    def capacity(self):
        return self.room


def _climb(share, capacity, *, base=100, slope=10):
    memory, ran = FakeMemory(base, slope, capacity), []

    def step(size):
        ran.append(size)
        memory.size = size

    return micro_batch.largest_that_fits(share, step, memory), ran


def test_candidates_are_powers_of_two_that_divide_the_share():
    assert micro_batch.candidates(24) == (1, 2, 4, 8)
    assert micro_batch.candidates(7) == (1,)


def test_takes_the_largest_that_fits_and_never_runs_one_that_would_not():
    # 8 images need 180; 16 would need 260 of 250.
    assert _climb(64, 250) == (8, [1, 2, 4, 8])
    assert _climb(64, 10_000) == (64, [1, 2, 4, 8, 16, 32, 64])
    assert _climb(12, 10_000) == (4, [1, 2, 4])


@pytest.mark.parametrize(
    ("size", "error", "remedy"),
    [
        (16, MemoryError(), "--batch.micro_batch_size 8."),
        (1, RuntimeError("DefaultCPUAllocator: can't allocate memory: x"), "--student.activation_"),
        (6, torch.OutOfMemoryError("CUDA out of memory"), "--batch.micro_batch_size 3."),
    ],
)
def test_out_of_memory_is_one_sentence_with_the_next_value(size, error, remedy):
    with (
        pytest.raises(micro_batch.OutOfMemory, match=re.escape(remedy)),
        micro_batch.out_of_memory_named(size),
    ):
        raise error


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="another"), micro_batch.out_of_memory_named(1):
        raise RuntimeError("another")


def test_host_memory_sees_an_allocation(tmp_path):
    memory = micro_batch.HostMemory()
    memory.reset()
    before = memory.peak()
    block = bytearray(64 << 20)
    assert memory.peak() - before >= 60 << 20
    del block
    memory.reset()
    assert memory.peak() < before + (32 << 20)
    assert memory.capacity() > memory.peak()


def test_a_found_size_is_remembered_for_the_same_ranks_only(tmp_path):
    assert micro_batch.remembered(tmp_path, 2, 16) is None
    micro_batch.remember(tmp_path, 2, 8)
    assert micro_batch.remembered(tmp_path, 2, 16) == 8
    assert micro_batch.remembered(tmp_path, 3, 16) is None
    assert micro_batch.remembered(tmp_path, 2, 12) is None, "8 does not divide 12"
