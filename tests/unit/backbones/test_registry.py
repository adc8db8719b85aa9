from __future__ import annotations

import pytest
import torch

from fd_large.backbones.registry import build
from fd_large.recipes.architectures import ARCHITECTURES, Architecture, resolve


def count(net) -> int:
    return sum(p.numel() for p in net.parameters())


# (plain, with a norm after every sixth block, with one position-bias MLP a stage); measured on the
# published classes.
SWINV2 = {
    "swinv2_tiny": (27_578_154, 27_578_922, 27_518_250),
    "swinv2_small": (48_959_418, 48_961_722, 48_807_354),
    "swinv2_base": (86_893_816, 86_896_888, 86_701_304),
    "swinv2_large": (195_202_932, 195_207_540, 194_929_524),
    "swinv2_huge": (655_210_922, 655_219_370, 654_735_274),
    "swinv2_1b": (1_060_976_996, 1_060_987_748, 1_060_380_004),
    "swinv2_giant": (2_997_815_008, 2_997_843_680, 2_996_179_680),
}


@pytest.mark.parametrize("name", SWINV2)
def test_swinv2_counts(name):
    with torch.device("meta"):
        plain = build(name, Architecture(extra_norm_every=0))
        normed = build(name, Architecture(extra_norm_every=6))
        shared = build(name, Architecture(extra_norm_every=0, shared_position_bias=True))
    assert (count(plain), count(normed), count(shared)) == SWINV2[name]


def test_giant_has_seven_extra_norms_in_stage_3():
    with torch.device("meta"):
        net = build("swinv2_giant")
    assert count(net) == 2_997_843_680
    places = [
        (s, b)
        for s, stage in enumerate(net.layers)
        for b, block in enumerate(stage.blocks)
        if block.extra_norm is not None
    ]
    assert places == [(2, b) for b in (5, 11, 17, 23, 29, 35, 41)]
    assert net.grid(192, 192) == (6, 6)
    assert net.width == 4096


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vit_base_patch16", 85_665_360),
        ("vit_large_patch14", 302_955_584),
        ("swin_base_esvit", 86_917_944),
        ("dino_vit_base_patch16", 85_798_656),
    ],
)
def test_other_counts(name, parameters):
    with torch.device("meta"):
        assert count(build(name)) == parameters


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_shapes_on_the_meta_device(name):
    size = 192 if name in ("swinv2_1b", "swinv2_huge", "swinv2_giant") else 224
    depths = getattr(resolve(name), "depths", ())
    shallow = Architecture(depths=(1,) * len(depths)) if depths else Architecture()
    with torch.device("meta"):
        net = build(name, shallow)
        feature_map = net(torch.empty(2, 3, size, size))
    rows, columns = net.grid(size, size)
    assert feature_map.grid == (rows, columns)
    n = net.num_prefix_tokens + rows * columns
    assert feature_map.tokens.shape == (2, n, net.width)
    assert len(net.drop_path_rates) == 2 * len(net.blocks())
    assert net.stride * rows == size


@pytest.mark.parametrize(
    ("name", "tokens", "width"),
    [
        ("clip_vit_base_patch16", 197, 768),
        ("clip_vit_large_patch14", 257, 1024),
        ("deit_distilled_vit_base_patch16", 197, 768),
        ("swin_base_esvit", 49, 1024),
        ("swin_base_esvit_s3", 196, 512),
    ],
)
def test_teacher_maps(name, tokens, width):
    with torch.device("meta"):
        feature_map = build(name)(torch.empty(1, 3, 224, 224))
    assert feature_map.tokens.shape == (1, tokens, width)


def test_seed_leaves_the_global_generator_alone():
    small = Architecture(embed_dim=8, depths=(1,), num_heads=(1,), window_size=2)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    a = build("swinv2_tiny", small, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    b = build("swinv2_tiny", small, seed=1)
    c = build("swinv2_tiny", small, seed=2)
    assert torch.equal(a.patch_embed.proj.weight, b.patch_embed.proj.weight)
    assert not torch.equal(a.patch_embed.proj.weight, c.patch_embed.proj.weight)
