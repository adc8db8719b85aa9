from __future__ import annotations

import math

import pytest
import torch

from fd_large.backbones.initialization import CUT_AT_ONE_SIGMA, OFFICIAL, fill, scheme
from fd_large.backbones.swin.swin import Swin
from fd_large.backbones.swinv2.swinv2 import SwinV2
from fd_large.backbones.vit.vit import ViT
from fd_large.errors import ConfigError


def swinv2(initialization: str, **options) -> SwinV2:
    torch.manual_seed(0)
    return SwinV2(
        64,
        (2, 2),
        (2, 4),
        window_size=4,
        initialization=initialization,
        extra_norm_every=2,
        **options,
    )


def vit(initialization: str) -> ViT:
    torch.manual_seed(0)
    return ViT(
        128,
        3,
        4,
        patch_size=8,
        image_size=32,
        absolute_position=False,
        relative_position="shared",
        layer_scale=0.1,
        qkv_bias="qv",
        initialization=initialization,
    )


def close(tensor, std, tolerance=0.05):
    return abs(tensor.std().item() / std - 1) < tolerance


def test_cut_at_one_sigma():
    torch.manual_seed(0)  # The bound on the deviation is about two of its own deviations.
    x = torch.empty(1000, 1000)
    fill(x, CUT_AT_ONE_SIGMA)
    assert close(x, 0.01079, 1e-3)
    assert x.abs().max() <= 0.02
    assert abs(x.mean()) < 1e-4


def test_fd_vit():
    net = vit("fd")
    assert close(net.patch_embed.proj.weight, 0.01079)
    assert close(net.cls_token, 0.01079, 0.3)
    for i, block in enumerate(net.blocks):
        assert close(block.attn.qkv.weight, 0.01079)
        assert close(block.mlp.fc1.weight, 0.01079)
        for end in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert close(end, 0.01079 / math.sqrt(2 * (i + 1)))
        assert (block.gamma_1 == 0.1).all()
        assert (block.gamma_2 == 0.1).all()
        assert (block.norm1.weight == 1).all()
        for bias in (block.attn.q_bias, block.attn.v_bias, block.mlp.fc1.bias, block.norm1.bias):
            assert (bias == 0).all()
    assert (net.rel_pos_bias.relative_position_bias_table == 0).all()
    assert (net.patch_embed.proj.bias == 0).all()


def test_official_vit():
    net = vit("official")
    assert close(net.blocks[2].mlp.fc2.weight, 0.02)
    bound = 1 / math.sqrt(3 * 64)
    assert close(net.patch_embed.proj.weight, bound / math.sqrt(3))
    assert net.patch_embed.proj.bias.abs().max() <= bound


def test_fd_swinv2():
    net = swinv2("fd")
    assert close(net.patch_embed.proj.weight, 0.02)
    assert (net.patch_embed.proj.bias == 0).all()
    for number, block in enumerate(net.blocks(), 1):
        assert close(block.attn.qkv.weight, 0.02)
        assert close(block.mlp.fc1.weight, 0.02)
        assert close(block.attn.cpb_mlp[0].weight, 0.02, 0.1)
        assert close(block.attn.cpb_mlp[2].weight, 0.02, 0.1)
        for end in (block.attn.proj.weight, block.mlp.fc2.weight):
            assert close(end, 0.02 / math.sqrt(2 * number))
        for norm in (block.norm1, block.norm2):
            assert (norm.weight == 1e-5).all()
            assert (norm.bias == 0).all()
        torch.testing.assert_close(
            block.attn.logit_scale.exp(), torch.full_like(block.attn.logit_scale, 10)
        )
        assert (block.attn.q_bias == 0).all()
    assert (net.blocks()[1].extra_norm.weight == 1).all()
    assert (net.norm.weight == 1).all()
    assert (net.layers[0].downsample.norm.weight == 1).all()
    assert close(net.layers[0].downsample.reduction.weight, 0.02)
    assert net.blocks()[0].attn.qkv.weight.abs().max() > 0.05  # No cut.


def test_official_swinv2():
    net = swinv2("official")
    bound = 1 / math.sqrt(3 * 16)
    assert close(net.patch_embed.proj.weight, bound / math.sqrt(3))
    assert net.patch_embed.proj.weight.abs().max() <= bound
    assert (net.patch_embed.proj.bias != 0).any()
    for block in net.blocks():
        assert close(block.mlp.fc2.weight, 0.02)
        assert (block.norm1.weight == 0).all()
        assert (block.norm2.weight == 0).all()


def test_official_swinv2_starts_silent():
    net = swinv2("official")
    seen = []
    for block in net.blocks():
        block.register_forward_hook(lambda m, given, out: seen.append((given[0], out[0])))
    net(torch.randn(1, 3, 32, 32))
    assert torch.equal(*seen[0])


def test_swin_tables_are_drawn():
    torch.manual_seed(0)
    net = Swin(32, (1,), (4,), window_size=7, patch_size=4, image_size=28)
    assert close(net.blocks()[0].attn.relative_position_bias_table, 0.02, 0.1)


def test_none_is_zeros():
    before = torch.manual_seed(0).get_state()
    net = swinv2("none")
    assert torch.equal(torch.get_rng_state(), before)
    assert (net.blocks()[0].attn.qkv.weight == 0).all()
    assert (net.patch_embed.proj.weight == 0).all()


@pytest.mark.parametrize("make", [swinv2, vit])
def test_the_seed_decides(make):
    a, b = make("fd"), make("fd")
    for p, q in zip(a.parameters(), b.parameters(), strict=True):
        assert torch.equal(p, q)


def casting(factory):
    def cast(*arguments, **options):
        out = factory(*arguments, **options)
        return out.to(torch.bfloat16) if out.is_floating_point() else out

    return cast


@pytest.mark.parametrize("make", [swinv2, vit])
def test_factories_that_cast_do_not_change_the_draws(make, monkeypatch):
    """A stand-in for zero.Init: it patches torch's factories to the dtype of the engine."""
    plain = make("fd")
    for name in ("tensor", "empty", "zeros", "ones", "full", "arange", "eye", "randn"):
        monkeypatch.setattr(torch, name, casting(getattr(torch, name)))
    patched = make("fd")
    monkeypatch.undo()
    for (name, p), q in zip(plain.named_parameters(), patched.parameters(), strict=True):
        assert q.dtype == torch.bfloat16
        assert torch.equal(p.bfloat16(), q), name


def test_unknown_scheme_is_named():
    with pytest.raises(ConfigError, match="nearest: official"):
        scheme({"official": OFFICIAL}, "oficial")
