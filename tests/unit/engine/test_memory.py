"""Memory of a rank is seen, runs out in one sentence, and is kept from forked processes."""

from __future__ import annotations

import mmap
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from unit.engine.conftest import CONFIGS, Brightness, batch_of

from fd_large.backbones.vit.vit import ViT
from fd_large.engine import memory
from fd_large.engine.forward_backward import forward_backward
from fd_large.engine.memory import kept_from_children
from fd_large.engine.task import Task
from fd_large.engine.zero import state
from fd_large.engine.zero.optimizer import set_learning_rate


class Wide(Brightness):
    """Tensors of more than a page."""

    def __init__(self) -> None:
        Task.__init__(self, ViT(128, 1, 2, patch_size=4, image_size=8))
        self.head = nn.Linear(128, 1)


def seen_by_a_child(tensors) -> list[bool]:
    """Whether a process that is forked now has the middle of each tensor in its memory."""
    middles = [one.data_ptr() + one.numel() * one.element_size() // 2 for one in tensors]
    read, write = os.pipe()
    if (child := os.fork()) == 0:
        try:
            lines = Path("/proc/self/maps").read_text().splitlines()
            spans = [[int(end, 16) for end in line.split()[0].split("-")] for line in lines]
            found = [any(low <= place < high for low, high in spans) for place in middles]
            os.write(write, bytes(found))
        finally:
            os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        found = [bool(one) for one in pipe.read()]
    assert os.waitpid(child, 0)[1] == 0
    assert len(found) == len(middles)
    return found


@pytest.mark.skipif(
    not hasattr(mmap, "MADV_DONTFORK"), reason="only Linux keeps pages from children"
)
@pytest.mark.parametrize("config", [*CONFIGS, (1, False), (2, True)])
def test_a_child_does_not_hold_weights_and_state(make_engine, config):
    engine = make_engine(config, make_task=Wide)
    forward_backward(engine, batch_of(0), seed=0)
    engine.deepspeed.step()
    tensors = [*state.written(engine), *(piece.values for piece in state.shards(engine))]
    large = [one for one in tensors if one.numel() * one.element_size() >= 4 * mmap.PAGESIZE]
    assert len(large) >= 4 * 4, "weights, masters and two moments of four matrices"
    with kept_from_children(state.written(engine)):
        assert not any(seen_by_a_child(large))
    assert all(seen_by_a_child(large))
    # The parent goes on as before.
    before = [one.clone() for one in large]
    set_learning_rate(engine.deepspeed.optimizer, 1e-2)
    forward_backward(engine, batch_of(1), seed=0)
    engine.deepspeed.step()
    assert any(not one.equal(other) for one, other in zip(large, before, strict=True))


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
        pytest.raises(memory.OutOfMemory, match=re.escape(remedy)),
        memory.out_of_memory_named(size),
    ):
        raise error


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="another"), memory.out_of_memory_named(1):
        raise RuntimeError("another")


def test_host_memory_sees_an_allocation():
    # In a process of its own: threads that earlier tests left here may free memory meanwhile.
    script = """
from fd_large.engine.memory import HostMemory
memory = HostMemory()
memory.reset()
before = memory.peak()
block = bytearray(64 << 20)
print(memory.peak() - before)
del block
memory.reset()
print(memory.peak() - before, memory.capacity() - memory.peak())
"""
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True, timeout=60
    )
    grown, left, free = map(int, done.stdout.split())
    assert grown >= 60 << 20
    assert left < 32 << 20
    assert free > 0
