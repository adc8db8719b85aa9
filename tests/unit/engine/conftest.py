"""A tiny task in a real DeepSpeed engine, on one rank of this process."""

from __future__ import annotations

import os

import pytest
import torch
from launch import free_port
from torch import nn

from fd_large.backbones.vit.vit import ViT
from fd_large.data.loader import Batch
from fd_large.engine.task import Task
from fd_large.engine.zero import config as ds
from fd_large.engine.zero import start
from fd_large.engine.zero.engine import build_engine
from fd_large.ranks import distributed
from fd_large.ranks.launch import Launch
from fd_large.recipes.sections import Optim

CONFIGS = {
    "whole": (0, False),
    "flat": (1, True),
    "sharded": (3, False),
    "sharded_bfloat16": (3, True),
    "disk": (3, True),
}
"""Where the state lives: ZeRO stage, and whether parameters are bfloat16; or on a disk."""


class Brightness(Task):
    """Learns the mean of an image."""

    def __init__(self, drop_path_rate: float = 0.3) -> None:
        super().__init__(ViT(8, 2, 2, patch_size=4, image_size=8, drop_path_rate=drop_path_rate))
        self.head = nn.Linear(8, 1)

    def prepare(self, images, targets, keep):
        pixels = images.float() / 255
        return {"pixels": pixels, "targets": pixels.mean((1, 2, 3)), "keep": keep}

    def forward(self, *, pixels, targets, keep):
        tokens = self.student(pixels.to(self.head.weight.dtype), keep).tokens
        found = self.head(tokens.mean(1))[:, 0].float()
        return (found - targets).square().mean(), {}


@pytest.fixture(scope="module")
def one_rank():
    """Torch's process group and DeepSpeed on it, for the tests of a file."""
    before = dict(os.environ)
    patch = pytest.MonkeyPatch()
    patch.setattr(distributed, "watch_launcher", lambda *_: None)
    # A command that failed in another test may have left its group to this process.
    start.stop()
    distributed.stop()
    alone = {"rank": 0, "world_size": 1, "local_rank": 0, "local_world_size": 1}
    place = {"master_addr": "127.0.0.1", "master_port": free_port()}
    distributed.start(Launch(launcher="python", **alone, **place))
    start.start()
    yield
    # What DeepSpeed keeps of the group would be found by the next file.
    start.stop()
    distributed.stop()
    patch.undo()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def make_engine(one_rank, tmp_path):
    """Returns (config, seed) -> a task in its engine; destroyed after the test.

    A config is a name in `CONFIGS`, or a stage and whether parameters are bfloat16. A test that
    destroys an engine itself takes it out of `engines`.
    """
    engines = []

    def make(
        config="whole",
        *,
        seed=0,
        accumulation=1,
        clip_norm=1.0,
        make_task=Brightness,
        optim=None,
        zero=None,
        **more,
    ):
        stage, bfloat16 = CONFIGS.get(config, config)
        numbers = ds.RunNumbers(2, accumulation, 1, 1, clip_norm, bfloat16, (8,))
        zero = {"stage": stage, **(zero or {})}
        if config == "disk":
            zero["offload_optimizer"] = {"device": "nvme"}
            numbers = numbers._replace(nvme_path=str(tmp_path))
        filled = ds.fill({"zero_optimization": zero}, numbers)
        engine = build_engine(make_task, filled, optim=optim or Optim(), seed=seed, **more)
        engine.task.train()
        engines.append(engine)
        return engine

    make.engines = engines
    yield make
    for engine in engines:
        engine.deepspeed.destroy()
    start.forget_engines()


def batch_of(number: int, size: int = 2) -> Batch:
    """Micro batch `number` of an endless epoch."""
    generator = torch.Generator().manual_seed(number)
    images = torch.randint(0, 256, (size, 3, 8, 8), dtype=torch.uint8, generator=generator)
    positions = torch.arange(size) + size * number
    return Batch(images, 0, positions, positions)
