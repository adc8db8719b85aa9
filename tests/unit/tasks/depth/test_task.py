"""The depth whole: losses, gradients, learning rates, what is frozen and counted."""

from __future__ import annotations

import pytest
import torch
from depth_batches import batch_of, narrow_run
from torch.utils.flop_counter import FlopCounterMode

from fd_large.engine.counting.count import step_flops
from fd_large.engine.forward_backward import arguments_of_step
from fd_large.recipes import registry
from fd_large.tasks.depth.job import DepthJob
from fd_large.tasks.depth.task import Depth

RECIPES = [name for name in registry.RECIPES if name.startswith("nyuv2_")]
SWIN, VIT = "nyuv2_swinv2_giant", "nyuv2_vit_base"


def depth(name: str = SWIN, **own: object) -> Depth:
    torch.manual_seed(0)
    return DepthJob(narrow_run(name, **own)).make_task()


def loss_of(task: Depth, batch, keep=None):
    return task(**task.prepare(batch.images, batch.targets, keep))[0]


@pytest.mark.parametrize("name", RECIPES)
def test_a_recipe_s_twin_trains_and_gives_metres(name):
    task, batch = depth(name), batch_of([0, 1])
    keep = torch.ones(len(task.drop_path_rates), 2, dtype=torch.bool)
    loss = loss_of(task, batch, keep)
    loss.backward()
    assert loss.dtype == torch.float32
    missing = {name for name, p in task.named_parameters() if p.grad is None}
    frozen = {name for name, _ in task.named_parameters() if name.startswith("student.")}
    assert missing == (frozen if task.frozen else set())
    assert {task.layer_scale(name, 0.5) for name in missing} <= {0.0}
    found = task.eval().predict(batch.images)
    assert found.shape == (2, 64, 64)
    if not task.frozen:
        # The published start: half of the largest depth everywhere.
        torch.testing.assert_close(found, torch.full_like(found, 5.0), atol=0.05, rtol=0)


def test_images_of_any_size_are_seen_by_a_swin():
    found = depth().eval().predict(batch_of([0]).images[..., :53, :47])
    assert found.shape == (1, 53, 47)


@pytest.mark.parametrize("over", ["batch", "image"])
def test_a_batch_without_a_depth_has_no_loss_and_no_gradient(over):
    task = depth(loss_over=over)
    loss = loss_of(task, batch_of([0, 1], unknown=True))
    loss.backward()
    assert loss.item() == 0
    assert all(p.grad.eq(0).all() for p in task.parameters())


def test_each_merging_is_a_layer_of_its_own():
    task = depth()
    # Depths 1, 1, 2, 1 and three mergings, between the patches and what is above.
    ids = {
        "student.patch_embed.proj.weight": 9,
        "student.layers.0.blocks.0.norm1.weight": 8,
        "student.layers.0.downsample.reduction.weight": 7,
        "student.layers.2.blocks.1.norm1.weight": 3,
        "student.layers.2.downsample.reduction.weight": 2,
        "student.layers.3.blocks.0.mlp.fc1.bias": 1,
        "norm.weight": 0,
        "head.last.0.weight": 0,
    }
    assert ids.keys() <= dict(task.named_parameters()).keys()
    assert {name: task.layer_scale(name, 0.5) for name in ids} == {
        name: 0.5**above for name, above in ids.items()
    }
    # A ViT has no mergings.
    assert depth(VIT).layer_scale("student.blocks.0.norm1.weight", 0.5) == 0.5**4


@pytest.mark.parametrize("name", [SWIN, "nyuv2_linear"])
def test_a_step_is_counted_on_shapes_as_torch_counts_it(name):
    counted = step_flops(DepthJob(narrow_run(name)), 2, checkpointing=False)
    with FlopCounterMode(display=False) as counter:
        loss_of(depth(name), batch_of([0, 1])).backward()
    assert counted is not None
    assert counted.model == counter.get_total_flops()


def test_micro_batches_of_a_step_have_one_root():
    """With a head that has no statistics of a pass; one of the parts has no depth."""
    task = depth()
    for norm in task.norms:
        norm.eval()
    batch = batch_of([0, 1, 2])
    found = {}
    for parts in ([batch], [batch_of([i], unknown=i == 3) for i in (2, 0, 1, 3)]):
        arguments = arguments_of_step(task, task, parts, seed=0, count=len(parts))
        losses = []
        for each in arguments:
            loss, _ = task(**each)
            (loss / len(parts)).backward()
            losses.append(loss.item())
        gradients = [p.grad.clone() for p in task.parameters() if p.grad is not None]
        task.zero_grad()
        found[len(parts)] = losses, gradients
    (alone, wanted), (together, got) = found.values()
    assert together == pytest.approx(alone * 4, rel=1e-6)
    for one, other in zip(wanted, got, strict=True):
        assert (one - other).norm() <= 1e-5 * one.norm() + 1e-9
    # Each image has a root of its own anyway.
    assert not depth(loss_over="image").two_passes(3)


def test_the_first_pass_of_several_micro_batches_is_counted():
    job = DepthJob(narrow_run(VIT))
    one, several = (
        step_flops(job, 2, checkpointing=False, micro_batches=count) for count in (1, 3)
    )
    assert several.model == one.model
    forward = depth(VIT)
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        loss_of(forward, batch_of([0, 1]))
    assert several.hardware == one.hardware + counter.get_total_flops()


def test_the_giant_has_three_billion_parameters():
    with torch.device("meta"):
        task = DepthJob(registry.get(SWIN)).make_task()
    count = {
        name: sum(p.numel() for p in part.parameters()) for name, part in task.named_children()
    }
    # A SwinV2-G without its final norm, a new one, and a decoder of 512 channels.
    assert count == {"student": 2_997_835_488, "norm": 8_192, "head": 3_046_081}
