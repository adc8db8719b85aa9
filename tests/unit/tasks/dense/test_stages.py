"""Features of a Swin model at odd sizes, against padding and windows cut by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from dense_models import lively, mlp, norm, padded, swin_of
from tiny_timm import tiny
from torch import Tensor, nn

from fd_large.backbones.registry import build
from fd_large.backbones.swinv2.swinv2 import SwinV2
from fd_large.engine.block_wrappers import checkpoint_blocks
from fd_large.errors import ConfigError
from fd_large.recipes.architectures import Architecture
from fd_large.tasks.dense.stages import features, strip

OFFICIAL = {"window_rule": "official"}


def by_hand_attention(
    attention: nn.Module, x: Tensor, window: int, shift: int, *, hide: bool
) -> Tensor:
    """One image (H, W, C), one head; windows are cut out of a padded and rolled map."""
    height, width, _ = x.shape
    whole = padded(x, window)
    real = padded(torch.ones(height, width, 1), window)[..., 0] > 0
    if not hide:
        real.fill_(True)
    regions = torch.zeros(whole.shape[:2])
    cuts = (slice(0, -window), slice(-window, -shift or None), slice(-shift, None))
    for i, rows in enumerate(cuts if shift else ()):
        for j, columns in enumerate(cuts):
            regions[rows, columns] = 3 * i + j
    qkv = F.linear(whole, attention.qkv.weight, attention.qkv.bias)
    if getattr(attention, "q_bias", None) is not None:
        qkv = qkv + torch.cat(
            [attention.q_bias, torch.zeros_like(attention.q_bias), attention.v_bias]
        )
    place = torch.stack(
        torch.meshgrid(torch.arange(window), torch.arange(window), indexing="ij"), -1
    ).reshape(-1, 2)
    offset = place[:, None] - place[None]  # query - key
    if hasattr(attention, "logit_scale"):
        w0 = attention.pretrained_window or window
        steps = 8 * offset.float() / (w0 - 1)
        logs = steps.sign() * torch.log2(steps.abs() + 1) / math.log2(8)
        bias = 16 * torch.sigmoid(nn.Sequential.forward(attention.cpb_mlp, logs))[..., 0]
        scale = attention.logit_scale.exp().item()
    else:
        side = 2 * window - 1
        index = (offset[..., 0] + window - 1) * side + offset[..., 1] + window - 1
        bias, scale = attention.relative_position_bias_table[index, 0], x.shape[-1] ** -0.5
    qkv, rolled = (torch.roll(t, (-shift, -shift), (0, 1)) for t in (qkv, real))
    out = torch.zeros(*whole.shape[:2], x.shape[-1])
    for top in range(0, whole.shape[0], window):
        for left in range(0, whole.shape[1], window):
            here = (slice(top, top + window), slice(left, left + window))
            q, k, v = qkv[here].flatten(0, 1).chunk(3, dim=-1)
            if hasattr(attention, "logit_scale"):
                q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
            logits = q @ k.T * scale + bias
            region = regions[here].flatten()
            logits = logits - 100.0 * (region[:, None] != region[None])
            logits[:, ~rolled[here].flatten()] = -torch.inf
            out[here] = (logits.softmax(-1) @ v).unflatten(0, (window, window))
    out = torch.roll(out, (shift, shift), (0, 1))[:height, :width]
    return F.linear(out, attention.proj.weight, attention.proj.bias)


def by_hand(net: nn.Module, image: Tensor, rules: dict) -> list[Tensor]:
    """The maps of the four stages of one image (3, H, W)."""
    p = net.patch_size
    image = padded(image.permute(1, 2, 0), p).permute(2, 0, 1)
    x = net.patch_embed.proj(image[None])[0].permute(1, 2, 0)
    x = norm(net.patch_embed.norm, x)
    official = rules.get("window_rule") == "official"
    shifted = rules.get("shift_stages", (True,) * 4)
    maps = []
    for s, stage in enumerate(net.layers):
        for i, block in enumerate(stage.blocks):
            window = rules["stage_windows"][s] if "stage_windows" in rules else net.window_size
            if not official:
                window = min(window, *x.shape[:2])
            moves = i % 2 and shifted[s] and (official or min(x.shape[:2]) > window)
            where = {"window": window, "shift": window // 2 if moves else 0, "hide": not official}
            if isinstance(net, SwinV2):
                x = x + norm(block.norm1, by_hand_attention(block.attn, x, **where))
                x = x + norm(block.norm2, mlp(block.mlp, x))
            else:
                x = x + by_hand_attention(block.attn, norm(block.norm1, x), **where)
                x = x + mlp(block.mlp, norm(block.norm2, x))
        maps.append(x)
        if stage.downsample is not None:
            x = padded(x, 2)
            four = torch.cat([x[::2, ::2], x[1::2, ::2], x[::2, 1::2], x[1::2, 1::2]], dim=-1)
            reduce = stage.downsample.reduction
            if isinstance(net, SwinV2):
                x = norm(stage.downsample.norm, reduce(four))
            else:
                x = reduce(norm(stage.downsample.norm, four))
    return maps


@torch.no_grad()
@pytest.mark.parametrize(
    ("model", "shape", "size", "grids", "rules"),
    [
        pytest.param(
            "swinv2_tiny",
            {"window_size": 16, "depths": (2, 2, 2, 2), "pretrained_window_sizes": (12, 12, 12, 6)},
            (801, 1333),
            ((201, 334), (101, 167), (51, 84), (26, 42)),
            {},
            id="801x1333-window-16",
        ),
        pytest.param(
            "swinv2_giant",
            {"window_size": 32, "depths": (1, 1, 1, 2)},
            (1536, 1536),
            ((384, 384), (192, 192), (96, 96), (48, 48)),
            {},
            id="1536-window-32",
            marks=pytest.mark.sweep,
        ),
        pytest.param(
            "swinv2_giant",
            {"window_size": 8, "depths": (1, 1, 1, 2)},
            (384, 384),
            ((96, 96), (48, 48), (24, 24), (12, 12)),
            {},
            id="384-window-8",
        ),
        pytest.param(
            "swin_base_esvit",
            {"window_size": 4, "depths": (2, 2, 2, 2), "image_size": 128},
            (131, 197),
            ((33, 50), (17, 25), (9, 13), (5, 7)),
            {},
            id="first-swin",
        ),
        pytest.param(  # The second map is one window, which is shifted; the third is padded.
            "swinv2_tiny",
            {"depths": (1, 2, 2, 2), "pretrained_window_sizes": (6, 3, 3, 2)},
            (61, 90),
            ((16, 23), (8, 12), (4, 6), (2, 3)),
            {"stage_windows": (8, 12, 4, 2), "shift_stages": (True, True, True, False), **OFFICIAL},
            id="official-windows-of-stages",
        ),
        pytest.param(  # The last map is smaller than its window.
            "swin_base_esvit",
            {"window_size": 4, "depths": (2, 2, 2, 2), "image_size": 128},
            (70, 90),
            ((18, 23), (9, 12), (5, 6), (3, 3)),
            OFFICIAL,
            id="official-first-swin",
        ),
    ],
)
def test_odd_sizes_equal_padding_by_hand(model, shape, size, grids, rules):
    net = swin_of(model, rules, **shape)
    image = torch.randn(3, *size, generator=torch.Generator().manual_seed(2))
    maps = features(net, image[None], None)
    wanted = by_hand(net, image, rules)
    for got, want, grid in zip(maps, wanted, grids, strict=True):
        assert got.shape[1:3] == grid
        torch.testing.assert_close(got[0], want, atol=1e-5, rtol=1e-5)


def test_a_student_that_can_carry_no_pyramid_is_refused():
    with pytest.raises(ConfigError, match="4 stages"):
        strip(build("swin_base_esvit_s3", size_rule="pad"))
    with pytest.raises(ConfigError, match="'pad'"):
        strip(build("swinv2_tiny", Architecture(embed_dim=4, num_heads=(1, 1, 1, 1))))


def test_sequential_stages_and_checkpoints_change_nothing():
    shape = Architecture(embed_dim=4, depths=(2, 1, 1, 1), num_heads=(1,) * 4, window_size=4)
    pixels = torch.randn(1, 3, 70, 50)
    grads = []
    for frugal in (False, True):
        net = build("swinv2_tiny", shape, size_rule="pad", sequential_stages=2 * frugal, seed=3)
        strip(net)
        if frugal:
            assert net.layers[1].blocks[0].attn.memory == "sequential"
            assert net.layers[2].blocks[0].attn.memory == "keep"
            checkpoint_blocks(net.blocks(), mode="every")
        lively(net)
        sum(m.square().mean() for m in features(net, pixels, None)).backward()
        grads.append([p.grad for p in net.parameters()])
    for plain, frugal in zip(*grads, strict=True):
        torch.testing.assert_close(plain, frugal, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "name", [tiny("swin_tiny_patch4_window7_224"), "test_vit", "focalnet_tiny_srf"]
)
def test_models_of_timm_whose_stages_carry_no_pyramid(name: str) -> None:
    with torch.device("meta"):
        net = build(f"timm:{name}", is_trained=True)
    with pytest.raises(ConfigError, match=r"^student\.model"):
        strip(net)
