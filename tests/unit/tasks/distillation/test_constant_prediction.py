"""The baseline is the least loss that a prediction without an image can have."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.swinv2.swinv2 import SwinV2
from fd_large.tasks.distillation.constant_prediction import constant_prediction_loss
from fd_large.tasks.distillation.task import Distillation


def prepared(seed: int, channels: int = 6) -> dict:
    """Skewed targets, whose mean is not the minimum."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, 16, channels, generator=generator).exp() * 3
    return {
        "pixels": torch.zeros(2, 3, 32, 32),
        "keep": None,
        "target": FeatureMap(tokens, (4, 4), 0),
    }


@pytest.fixture
def task():
    student = SwinV2(8, (1, 1), (1, 2), window_size=4)
    return Distillation(student, lambda images: None, 6).eval()


def test_it_is_the_minimum_over_constants(task):
    batches = [(prepared(0), 1), (prepared(2), 0), (prepared(1), 1)]
    found = constant_prediction_loss(task, lambda: iter(batches), lambda t: t)
    target = torch.cat([task.reference(**prepared(seed)).flatten(0, 1) for seed in (0, 1)])
    constant = nn.Parameter(torch.zeros(target.shape[1]))
    optimizer = torch.optim.LBFGS([constant], max_iter=100)

    def closure():
        optimizer.zero_grad()
        loss = F.smooth_l1_loss(constant.expand_as(target), target, beta=2.0)
        loss.backward()
        return loss

    optimizer.step(closure)
    assert found == pytest.approx(closure().item(), rel=1e-5)
    # The mean alone is worse.
    mean = F.smooth_l1_loss(target.mean(0).expand_as(target), target, beta=2.0).item()
    assert found < mean * (1 - 1e-4)
