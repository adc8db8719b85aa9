import pytest
import torch

from fd_large.backbones.statistics import IMAGENET, normalise
from fd_large.backbones.swinv2.swinv2 import SwinV2
from fd_large.engine.frozen import Frozen
from fd_large.tasks.distillation.task import Distillation


@pytest.fixture
def task():
    torch.manual_seed(0)
    student = SwinV2(8, (1, 1), (1, 2), window_size=4, drop_path_rate=0.5)
    teacher = Frozen(SwinV2(12, (1, 1), (1, 2), window_size=4), IMAGENET)
    return Distillation(student, teacher, teacher.width)


@pytest.fixture
def images():
    return torch.randint(
        0, 256, (3, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
    )


def test_loss_is_the_formula_written_out(task, images):
    loss, metrics = task(**task.prepare(images, None, None))
    pixels = normalise(images, IMAGENET)
    target = task._teacher[0].net(pixels).tokens
    mean, variance = target.mean(-1, keepdim=True), target.var(-1, keepdim=True, unbiased=False)
    white = (target - mean) / (variance + 1e-5).sqrt()
    difference = (task.projection(task.student(pixels).tokens) - white).abs()
    by_hand = torch.where(difference < 2, difference**2 / 4, difference - 1).mean()
    assert loss.item() == pytest.approx(by_hand.item(), rel=1e-6)
    assert metrics == {}
    assert 0.2 < loss.item() < 0.6, "a fresh projection against unit targets"


def test_the_teacher_is_frozen_and_stays_in_evaluation(task, images):
    teacher = task._teacher[0]
    assert not any(name.startswith("_teacher") for name, _ in task.named_parameters())
    assert sum(p.numel() for p in task.parameters()) < sum(
        p.numel() for p in [*task.parameters(), *teacher.parameters()]
    )
    task.train()
    teacher.train()
    assert not teacher.training
    assert not teacher.net.training
    loss, _ = task(**task.prepare(images, None, None))
    loss.backward()
    assert all(p.grad is None and not p.requires_grad for p in teacher.parameters())


def test_drop_path_is_an_input_per_sample(task, images):
    keep = torch.ones(len(task.drop_path_rates), 3, dtype=torch.bool)
    keep[-1, 1] = False
    whole = task.student(normalise(images, IMAGENET), torch.ones_like(keep)).tokens
    dropped = task.student(normalise(images, IMAGENET), keep).tokens
    assert torch.equal(whole[[0, 2]], dropped[[0, 2]])
    assert not torch.equal(whole[1], dropped[1])


def test_bfloat16_keeps_the_loss_in_float32(task, images):
    exact, _ = task(**task.prepare(images, None, None))
    low = task.bfloat16()
    loss, _ = low(**low.prepare(images, None, None))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(exact.item(), rel=2e-2)


def test_evaluation_reports_the_cosine(task, images):
    task.eval()
    with torch.no_grad():
        _, metrics = task(**task.prepare(images, None, None))
    assert -1 <= metrics["cosine"].item() <= 1
