"""Blocks that stage 3 gathers whole: which they are, and that nothing else changes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from unit.engine.conftest import Brightness, batch_of

from fd_large.backbones.swin.swin import Swin
from fd_large.backbones.swinv2.swinv2 import SwinV2
from fd_large.backbones.vit.vit import ViT
from fd_large.engine.forward_backward import forward_backward
from fd_large.engine.task import Task
from fd_large.engine.zero import partition, whole_blocks
from fd_large.engine.zero.start import deepspeed

FITS, TOO_SMALL = 10_000, 100


def hooks(module: nn.Module) -> int:
    return len(module._forward_pre_hooks) + len(module._forward_hooks)


def inner(block: nn.Module) -> list[nn.Module]:
    return [module for module in block.modules() if module is not block]


def outside(backbone: nn.Module) -> list[nn.Module]:
    return [module for part in backbone.outside_blocks() for module in part.modules()]


def swinv2(**options: object) -> SwinV2:
    return SwinV2(8, (2, 1), (1, 2), window_size=2, **options)


class OfSwinV2(Brightness):
    """The same task with a SwinV2, whose stages call a part of each block before it."""

    def __init__(self) -> None:
        Task.__init__(self, swinv2(drop_path_rate=0.3))
        self.head = nn.Linear(16, 1)


@pytest.mark.parametrize("make_task", [Brightness, OfSwinV2])
def test_blocks_that_fit_have_no_hooks_inside_and_the_losses_stay(make_engine, make_task):
    losses = []
    for bucket in (TOO_SMALL, FITS):
        zero = {whole_blocks.PREFETCH: bucket, "stage3_param_persistence_threshold": 0}
        engine = make_engine("sharded", make_task=make_task, zero=zero)
        for block in engine.task.student.blocks():
            units = {block, *engine.task.student.outside_blocks()}
            for module in block.modules():
                assert hooks(module) == (4 if bucket == TOO_SMALL or module in units else 0)
        losses.append([])
        for number in range(3):
            losses[-1].append(forward_backward(engine, batch_of(number), 0).item())
            engine.deepspeed.step()
    assert losses[0] == losses[1]
    assert len({*losses[0]}) == 3


def test_what_is_used_outside_of_blocks_is_there_before_the_first_step(make_engine):
    zero = {whole_blocks.PREFETCH: FITS, "stage3_param_persistence_threshold": 0}
    task = make_engine("sharded", make_task=OfSwinV2, zero=zero).task.eval()
    whole = partition.build(OfSwinV2, {}, partitioned=False, seed=0).eval()
    pixels = batch_of(0).images / 255
    with torch.no_grad():
        # Beside the engine, as evaluations call it.
        assert torch.equal(task.student(pixels).tokens, whole.student(pixels).tokens)


@pytest.mark.parametrize(
    "make",
    [
        lambda: ViT(8, 2, 2, patch_size=4, image_size=8, relative_position="block"),
        lambda: ViT(8, 2, 2, patch_size=4, image_size=8, relative_position="shared"),
        lambda: Swin(8, (2, 1), (1, 2), window_size=2, image_size=8),
        swinv2,
        lambda: swinv2(shared_position_bias=True, extra_norm_every=2),
    ],
)
def test_a_family_names_what_it_uses_outside_of_blocks(make):
    backbone, running, seen = make(), set(), set()

    def called(module: nn.Module, block: nn.Module) -> None:
        if block not in running:
            seen.add(module)

    for block in backbone.blocks():
        block.register_forward_pre_hook(lambda block, _: running.add(block))
        block.register_forward_hook(lambda block, *_: running.remove(block))
        for module in inner(block):
            module.register_forward_pre_hook(lambda module, _, block=block: called(module, block))
    backbone(torch.rand(2, 3, 8, 8))
    assert seen == {*outside(backbone)}


@pytest.mark.parametrize(
    ("zero", "whole"),
    [
        # DeepSpeed chooses, by the user's threshold.
        ({whole_blocks.GRANULARITY: 1}, [False] * 3),
        ({whole_blocks.PREFETCH: 2000}, [True, True, False]),
        ({}, [True] * 3),
    ],
)
def test_blocks_that_do_not_fit_stay_as_they_are(make_engine, zero, whole):
    blocks = make_engine("sharded", make_task=OfSwinV2, zero=zero).task.student.blocks()
    assert [hooks(block.mlp) == 0 for block in blocks] == whole


def test_blocks_of_a_backbone_that_says_nothing_stay_as_they_are(make_engine, monkeypatch):
    monkeypatch.delattr(ViT, "outside_blocks")
    assert hooks(make_engine("sharded").task.student.blocks()[0].mlp) == 4


def test_a_frozen_model_has_no_hooks_for_a_backward(one_rank):
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    module = partition.build(swinv2, config, partitioned=True, seed=0).requires_grad_(False)
    engine, *_ = deepspeed.initialize(model=module, config=config)
    block = module.blocks()[0]
    before = hooks(block)
    whole_blocks.gather_whole(engine, module, config["zero_optimization"])
    assert (before, hooks(block), hooks(block.mlp)) == (4, 2, 0)
    assert (hooks(block.attn.cpb_mlp), hooks(block.attn.cpb_mlp[0])) == (2, 0)
    engine.destroy()
