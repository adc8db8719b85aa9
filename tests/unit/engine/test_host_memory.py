"""Processes that are forked beside training do not hold what it writes."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import pytest
from torch import nn
from unit.engine.conftest import CONFIGS, Brightness, batch_of

from fd_large.backbones.vit.vit import ViT
from fd_large.engine.forward_backward import forward_backward
from fd_large.engine.host_memory import kept_from_children
from fd_large.engine.task import Task
from fd_large.engine.zero import state
from fd_large.engine.zero.optimizer import set_learning_rate

pytestmark = pytest.mark.skipif(
    not hasattr(mmap, "MADV_DONTFORK"), reason="only Linux keeps pages from children"
)


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
