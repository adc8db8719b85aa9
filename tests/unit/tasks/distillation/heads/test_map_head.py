from functools import partial

import pytest
import torch

from fd_large.backbones.swinv2.swinv2 import SwinV2
from fd_large.backbones.vit.vit import ViT
from fd_large.engine.block_wrappers import checkpoint_blocks
from fd_large.errors import ConfigError
from fd_large.tasks.distillation.heads.map_head import MapShapes, with_blocks
from fd_large.tasks.distillation.heads.map_heads import (
    Convolutional,
    Ladder,
    ResizedMLP,
    UpsamplingMLP,
)


@pytest.fixture(scope="module")
def vit():
    torch.manual_seed(0)
    return ViT(16, 2, 2, patch_size=8, image_size=32)


def test_the_maps_after_the_blocks_are_heard_with_their_gradients(vit):
    images = torch.randn(2, 3, 32, 32)
    checkpoint_blocks(vit.blocks(), mode="every")
    last, maps = with_blocks(vit, partial(vit, images))
    for heard, tokens in zip(maps, vit.after_blocks(images), strict=True):
        assert torch.equal(heard.tokens, tokens)
        assert (heard.grid, heard.num_prefix_tokens) == (last.grid, last.num_prefix_tokens)
    maps[0].tokens.sum().backward()
    assert vit.patch_embed.proj.weight.grad.abs().sum() > 0
    assert not vit.blocks[0]._forward_hooks


def test_blocks_of_several_grids_carry_no_ladder():
    student = SwinV2(8, (1, 1), (1, 2), window_size=4)
    with pytest.raises(ConfigError, match=r"objective\.head.*blocks"):
        with_blocks(student, partial(student, torch.randn(1, 3, 32, 32)))


@pytest.mark.parametrize(
    ("make", "teacher_grid"),
    [
        (Ladder, (4, 4)),
        (ResizedMLP, (3, 5)),
        (UpsamplingMLP, (8, 8)),
        *((Convolutional, (side, side)) for side in (4, 6, 16, 24, 2, 1)),
    ],
)
def test_a_head_gives_the_teachers_width_and_trains_all_that_it_has(vit, make, teacher_grid):
    last, maps = with_blocks(vit, partial(vit, torch.randn(2, 3, 32, 32)))
    head = make(16, 5, MapShapes((4, 4), teacher_grid, last.num_prefix_tokens, 2))
    out = head(maps if head.reads_blocks else last)
    assert out.grid == (last.grid if make is Ladder else teacher_grid)
    assert out.tokens.shape == (2, out.num_prefix_tokens + out.grid[0] * out.grid[1], 5)
    # A sum would be blind to what stands before a norm.
    (out.tokens * torch.randn_like(out.tokens)).sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in head.parameters())


@pytest.mark.parametrize("make", [Convolutional, UpsamplingMLP])
def test_grids_that_a_head_cannot_reach_are_named(make):
    with pytest.raises(ConfigError, match=r"14x14 and 37x37"):
        make(16, 5, MapShapes((14, 14), (37, 37), 1, 2))


def test_a_ladder_reads_the_class_token_and_the_patches_of_a_student_with_registers():
    torch.manual_seed(0)
    student, images = (
        ViT(16, 2, 2, patch_size=8, image_size=32, num_registers=2),
        torch.rand(2, 3, 32, 32),
    )
    last, maps = with_blocks(student, partial(student, images))
    assert (last.num_prefix_tokens, last.tokens.shape[1]) == (1, 17)
    assert {(map_.num_prefix_tokens, map_.tokens.shape[1]) for map_ in maps} == {(3, 19)}
    head = Ladder(16, 5, MapShapes(last.grid, last.grid, last.num_prefix_tokens, 2))
    out = head(maps)
    assert out.tokens.shape == (2, 17, 5)
    without = [
        map_._replace(tokens=map_.tokens[:, [0, *range(3, 19)]], num_prefix_tokens=1)
        for map_ in maps
    ]
    assert torch.equal(head(tuple(without)).tokens, out.tokens)
    out.tokens.square().sum().backward()
    assert (student.reg_token.grad != 0).any(-1).all()
