"""The package on a card that is not here (tests/fake_cuda.py): where each tensor lies."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import tiny_runs
import torch
from fake_cuda import Card, fake_cuda, on_card

from fd_large import distributed
from fd_large.data.loader import Batch
from fd_large.engine import forward_backward
from fd_large.engine.task import Task
from fd_large.engine.zero import partition
from fd_large.recipes.architectures import Architecture
from fd_large.tasks.distillation.job import DistillationJob

SIDE = 32
VIT = Architecture(embed_dim=16, depths=(2,), num_heads=(2,), patch_size=8, image_size=SIDE)
SWIN = Architecture(
    embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=2, patch_size=4, image_size=SIDE
)
STUDENTS = {
    "vit_base_patch16": VIT,
    "swin_base_esvit": SWIN,
    "swinv2_tiny": SWIN,
    "timm:convnextv2_atto": Architecture(image_size=SIDE),
}
KERNELS = {"reference": (7, 5), "triton": (9, 0)}
"""What runs the fused operations, and the compute capability that makes it do so."""


@pytest.fixture
def card():
    with fake_cuda() as card:
        yield card


def batch_of(size: int = 2, side: int = 32, targets=None) -> Batch:
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(0, 256, (size, 3, side, side), dtype=torch.uint8, generator=generator)
    return Batch(images, 0, torch.arange(size), torch.arange(size), targets=targets)


def test_the_card_refuses_what_a_card_refuses(card: Card) -> None:
    there, here = on_card(torch.ones(2, 3)), torch.ones(2, 3)
    assert there.device == torch.device("cuda:0")
    assert (there * torch.tensor(2.0)).tolist() == [[2.0] * 3] * 2
    for mixed in (
        lambda: there + here,
        lambda: here.add_(there),
        lambda: torch.stack([there[0, 0], here[0, 0]]),
        lambda: torch.nn.functional.linear(there, here),
    ):
        with pytest.raises(RuntimeError, match="on the same device"):
            mixed()
    with pytest.raises(TypeError, match="can't convert cuda:0"):
        there.numpy()
    with pytest.raises(RuntimeError, match="one type"):
        torch.nn.functional.layer_norm(
            there.bfloat16(), (3,), torch.ones(3, device="cuda"), torch.zeros(3, device="cuda")
        )


def engine_ready(make: Callable[[], Task], *, bfloat16: bool = True) -> Task:
    """Builds a task and does to it what `build_engine` does before it calls DeepSpeed."""
    task = partition.build(make, {}, partitioned=False, seed=0)
    if bfloat16:
        partition.to_bfloat16(task)
    return task.to(distributed.device())


def step(task: Task, batch: Batch) -> torch.Tensor:
    """A micro batch as the engine would run it; returns the loss."""
    loss, _ = task.train()(**forward_backward.prepared(task, batch, seed=0))
    loss.backward()
    return loss


def gradients_are_there(task: Task) -> None:
    for name, parameter in task.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.device == torch.device("cuda:0"), name
        assert parameter.grad.dtype == parameter.dtype == torch.bfloat16, name


def distillation(name: str):
    """A tiny distillation of a student of each family, as a run on this machine builds it."""
    run = tiny_runs.tiny_run()
    student = replace(run.student, model=name, architecture=STUDENTS[name], drop_path_rate=0.3)
    objective = replace(run.objective, interpolation="bilinear")
    job = DistillationJob(replace(run, student=student, objective=objective))
    job.build(bfloat16=True, node_size=1, persistence_threshold=0)
    return engine_ready(job.make_task)


def test_the_card_computes_what_the_cpu_computes() -> None:
    expected = step(distillation("swinv2_tiny"), batch_of())
    with fake_cuda() as card:
        card.capability = KERNELS["reference"]
        found = step(distillation("swinv2_tiny"), batch_of())
        assert found.device == torch.device("cuda:0")
        assert found.item() == pytest.approx(expected.item(), rel=1e-3)


@pytest.mark.parametrize("kernels", KERNELS)
@pytest.mark.parametrize("name", STUDENTS)
def test_distillation(card: Card, name: str, kernels: str) -> None:
    card.capability = KERNELS[kernels]
    task = distillation(name)
    step(task, batch_of())  # What is made once, the host may wait for.
    with card.waiting() as waits:
        loss = step(task, batch_of())
    assert waits == []
    assert loss.isfinite()
    gradients_are_there(task)
    assert bool(card.fused) == (kernels == "triton")
