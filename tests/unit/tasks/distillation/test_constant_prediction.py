"""The baseline is the least loss that a prediction without an image can have."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.swinv2.swinv2 import SwinV2
from fd_large.tasks.distillation.constant_prediction import constant_prediction_losses
from fd_large.tasks.distillation.recipe_targets import make_target
from fd_large.tasks.distillation.target import references
from fd_large.tasks.distillation.task import Distillation


def prepared(seed: int, channels: int = 6, *, long: float = 0.0) -> dict:
    """Skewed targets, whose mean is not the minimum; one token in 16 may be long, and elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, 16, channels, generator=generator).exp() * 3
    tokens[:, 5] -= long
    return {
        "pixels": torch.zeros(2, 3, 32, 32),
        "keep": None,
        "maps": {"": FeatureMap(tokens, (4, 4), 0)},
    }


def task_of(loss: str, normaliser: str) -> Distillation:
    student = SwinV2(8, (1, 1), (1, 2), window_size=4)
    target = make_target(student.width, 6, loss=loss, normaliser=normaliser)
    return Distillation(student, {"": lambda images: None}, [target]).eval()


@pytest.mark.parametrize(
    ("loss", "normaliser", "long", "close"),
    [
        ("smooth_l1", "whitening", 0, 1e-3),
        ("cosine", "none", 0, 1e-5),
        ("cosine_of_map", "none", 0, 1e-5),
        ("l1", "whitening", 0, 1e-2),
        ("0.9 cosine + 0.1 smooth_l1", "none", 0, 1e-2),
        # The mean is further than beta from all tokens, and points away from most of them.
        ("smooth_l1", "none", 300, 1e-2),
        ("cosine", "none", 300, 1e-5),
        ("0.9 cosine_of_map + 0.1 smooth_l1", "none", 300, 2e-2),
    ],
)
def test_it_is_the_minimum_over_constants(loss, normaliser, long, close):
    task = task_of(loss, normaliser)
    batches = [
        (prepared(0, long=long), 1),
        (prepared(2, long=long), 0),
        (prepared(1, long=long), 1),
    ]
    (found,) = constant_prediction_losses(task, lambda: iter(batches), lambda t: t)
    target = torch.cat([references(task, **prepared(seed, long=long))[0] for seed in (0, 1)])
    mean = target.mean((0, 1))
    # The median is on the side of most tokens.
    starts = mean, target.flatten(0, 1).median(0).values
    assert found == pytest.approx(min(minimum(task, target, at) for at in starts), rel=close)
    # The mean alone is worse.
    assert found < task.targets[0].loss(mean.expand_as(target), target).item() * (1 - 1e-4)


def minimum(task: Distillation, target: torch.Tensor, start: torch.Tensor) -> float:
    """The least loss of a constant that L-BFGS finds."""
    constant = nn.Parameter(start.clone())
    optimizer = torch.optim.LBFGS([constant], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = task.targets[0].loss(constant.expand_as(target), target)
        loss.backward()
        return loss

    optimizer.step(closure)
    return closure().item()
