"""A model of the user's own as a teacher."""

from __future__ import annotations

import sys

import pytest
import torch
from loading import teacher_run

from fd_large.engine.frozen import frozen_weights
from fd_large.errors import ConfigError
from fd_large.tasks.distillation.job import DistillationJob
from fd_large.weights.source import Sources

OWN = """
import torch
from torch import nn
from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.statistics import Statistics

class Patches(nn.Module):
    width, num_prefix_tokens = 12, 0
    statistics = Statistics((0.1, 0.2, 0.3), (0.4, 0.5, 0.6))

    def __init__(self):
        super().__init__()
        self.cut = nn.Conv2d(3, 12, 8, stride=8)
        nn.init.constant_(self.cut.weight, 0.5)

    def grid(self, height, width):
        return height // 8, width // 8

    def forward(self, images, keep=None):
        x = self.cut(images)
        return FeatureMap(x.flatten(2).transpose(1, 2), tuple(x.shape[-2:]), 0)

def make():
    return Patches()

def broken():
    return nn.Linear(2, 2)
"""


@pytest.fixture
def _own_module(tmp_path, monkeypatch):
    (tmp_path / "own_nets").mkdir()
    (tmp_path / "own_nets" / "patches.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    yield
    for name in ("own_nets", "own_nets.patches"):
        sys.modules.pop(name, None)


@pytest.mark.usefixtures("_own_module")
def test_a_net_of_ones_own_teaches():
    run = teacher_run("module:own_nets.patches:make", "clip_vit_base_patch16")
    assert frozen_weights(run.teacher, Sources()) is None
    teacher = DistillationJob(run).make_teacher()
    assert teacher.statistics.mean == (0.1, 0.2, 0.3)
    got = teacher(torch.zeros(1, 3, 16, 16, dtype=torch.uint8))
    assert got.tokens.shape == (1, 4, 12)
    assert (teacher.net.cut.weight == 0.5).all()
    assert not any(p.requires_grad for p in teacher.parameters())


@pytest.mark.usefixtures("_own_module")
@pytest.mark.parametrize(
    ("function", "words"),
    [
        ("own_nets.patches:none", "no such function in own_nets.patches; got 'none'"),
        ("own_nets.nothing:make", "cannot be imported; got own_nets.nothing"),
        ("own_nets.patches:broken", "returns no backbone; got Linear without width"),
        ("own_nets.patches", "expected package.file:function"),
    ],
)
def test_functions_that_return_no_backbone(function, words):
    with pytest.raises(ConfigError, match=words):
        DistillationJob(teacher_run(f"module:{function}")).make_teacher()
