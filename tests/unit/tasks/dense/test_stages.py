"""Features at odd sizes against padding by hand, window by window; what a student keeps."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.backbones.registry import build
from fd_large.backbones.swinv2.swinv2 import SwinV2
from fd_large.engine.block_wrappers import checkpoint_blocks
from fd_large.errors import ConfigError
from fd_large.recipes.architectures import Architecture
from fd_large.tasks.dense.position_table import fit_offsets
from fd_large.tasks.dense.stages import features, pyramid_of, strides_of, strip
from fd_large.tasks.dense.windowed_vit import global_blocks


def lively(net: nn.Module) -> nn.Module:
    """Norms that end a branch start near zero, and tables at zero: both would hide mistakes."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.3 + 0.3)
            if "cpb_mlp" in name:
                parameter.mul_(20)
            if "bias_table" in name:
                parameter.add_(torch.randn(parameter.shape, generator=generator))
    return net


def swin_of(model: str, **shape: object) -> nn.Module:
    torch.manual_seed(0)
    heads = {"num_heads": (1, 1, 1, 1), "embed_dim": 4, "mlp_ratio": 1.0}
    # As the giant's recipe has it: attention of the first two stages for few windows at a time.
    net = build(model, Architecture(**(heads | shape)), size_rule="pad", sequential_stages=2)
    strip(net)
    return lively(net).eval()


# --- by hand ---


def padded(x: Tensor, multiple: int) -> Tensor:
    """Zeros right and bottom of a map (H, W, C)."""
    height, width, channels = x.shape
    rows, columns = -(-height // multiple) * multiple, -(-width // multiple) * multiple
    whole = torch.zeros(rows, columns, channels)
    whole[:height, :width] = x
    return whole


def by_hand_attention(attention: nn.Module, x: Tensor, window: int, shift: int) -> Tensor:
    """One image (H, W, C), one head; windows are cut out of a padded and rolled map."""
    height, width, _ = x.shape
    whole = padded(x, window)
    real = padded(torch.ones(height, width, 1), window)[..., 0] > 0
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


def norm(module: nn.Module, x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], module.weight, module.bias, module.eps)


def mlp(module: nn.Module, x: Tensor) -> Tensor:
    hidden = F.gelu(F.linear(x, module.fc1.weight, module.fc1.bias))
    return F.linear(hidden, module.fc2.weight, module.fc2.bias)


def by_hand(net: nn.Module, image: Tensor) -> list[Tensor]:
    """The maps of the four stages of one image (3, H, W)."""
    p = net.patch_size
    image = padded(image.permute(1, 2, 0), p).permute(2, 0, 1)
    x = net.patch_embed.proj(image[None])[0].permute(1, 2, 0)
    x = norm(net.patch_embed.norm, x)
    maps = []
    for stage in net.layers:
        for i, block in enumerate(stage.blocks):
            window = min(block.window_size, *x.shape[:2])
            shift = window // 2 if i % 2 and min(x.shape[:2]) > window else 0
            if isinstance(net, SwinV2):
                x = x + norm(block.norm1, by_hand_attention(block.attn, x, window, shift))
                x = x + norm(block.norm2, mlp(block.mlp, x))
            else:
                x = x + by_hand_attention(block.attn, norm(block.norm1, x), window, shift)
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
    ("model", "shape", "size", "grids"),
    [
        pytest.param(
            "swinv2_tiny",
            {"window_size": 16, "depths": (2, 2, 2, 2), "pretrained_window_sizes": (12, 12, 12, 6)},
            (801, 1333),
            ((201, 334), (101, 167), (51, 84), (26, 42)),
            id="801x1333-window-16",
        ),
        pytest.param(
            "swinv2_giant",
            {"window_size": 32, "depths": (1, 1, 1, 2)},
            (1536, 1536),
            ((384, 384), (192, 192), (96, 96), (48, 48)),
            id="1536-window-32",
            marks=pytest.mark.sweep,
        ),
        pytest.param(
            "swinv2_giant",
            {"window_size": 8, "depths": (1, 1, 1, 2)},
            (384, 384),
            ((96, 96), (48, 48), (24, 24), (12, 12)),
            id="384-window-8",
        ),
        pytest.param(
            "swin_base_esvit",
            {"window_size": 4, "depths": (2, 2, 2, 2), "image_size": 128},
            (131, 197),
            ((33, 50), (17, 25), (9, 13), (5, 7)),
            id="first-swin",
        ),
    ],
)
def test_odd_sizes_equal_padding_by_hand(model, shape, size, grids):
    net = swin_of(model, **shape)
    image = torch.randn(3, *size, generator=torch.Generator().manual_seed(2))
    maps = features(net, image[None], None)
    wanted = by_hand(net, image)
    for got, want, grid in zip(maps, wanted, grids, strict=True):
        assert got.shape[1:3] == grid
        torch.testing.assert_close(got[0], want, atol=1e-5, rtol=1e-5)


# --- ViT ---


def vit_of(**shape: object) -> nn.Module:
    torch.manual_seed(0)
    options = {"embed_dim": 8, "depths": (4,), "num_heads": (2,), "image_size": 64} | shape
    net = build(options.pop("model", "vit_base_patch16"), Architecture(**options))
    strip(net)
    return lively(net).eval()


def by_hand_vit(net: nn.Module, image: Tensor) -> Tensor:
    """The last map of one image; windows at the edge are cut smaller instead of padded."""
    x = net.patch_embed.proj(padded(image.permute(1, 2, 0), 16).permute(2, 0, 1)[None])[0]
    x = x.permute(1, 2, 0)
    rows, columns = x.shape[:2]
    side = net.image_grid[0]
    learned = net.rel_pos_bias.relative_position_bias_table[: (2 * side - 1) ** 2]
    for number, block in enumerate(net.blocks):
        whole = number in global_blocks(len(net.blocks))
        table = fit_offsets(learned, (side, side), (rows, columns)) if whole else learned
        reach = (rows, columns) if whole else (side, side)
        normed, out = norm(block.norm1, x), torch.zeros_like(x)
        for top in range(0, rows, reach[0]):
            for left in range(0, columns, reach[1]):
                here = (slice(top, top + reach[0]), slice(left, left + reach[1]))
                some = normed[here]
                spots = torch.stack(
                    torch.meshgrid(*(torch.arange(n) for n in some.shape[:2]), indexing="ij"), -1
                ).reshape(-1, 2)
                offset = spots[:, None] - spots[None]
                index = (offset[..., 0] + reach[0] - 1) * (2 * reach[1] - 1)
                bias = table[index + offset[..., 1] + reach[1] - 1]  # (N, N, h)
                attn = block.attn
                bias_of_qkv = torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias])
                q, k, v = (
                    t.unflatten(-1, (2, -1)).transpose(0, 1)
                    for t in F.linear(some.flatten(0, 1), attn.qkv.weight, bias_of_qkv).chunk(3, -1)
                )
                logits = q @ k.mT * q.shape[-1] ** -0.5 + bias.permute(2, 0, 1)
                mixed = (logits.softmax(-1) @ v).transpose(0, 1).flatten(1)
                out[here] = attn.proj(mixed).unflatten(0, some.shape[:2])
        x = x + block.gamma_1 * out
        x = x + block.gamma_2 * mlp(block.mlp, norm(block.norm2, x))
    return x


@torch.no_grad()
@pytest.mark.parametrize("size", [(64, 64), (100, 173), (40, 200)])
def test_windows_of_a_vit_equal_windows_cut_by_hand(size):
    net = vit_of()
    image = torch.randn(3, *size, generator=torch.Generator().manual_seed(2))
    got = features(net, image[None], None)
    assert got.shape[1:3] == (-(-size[0] // 16), -(-size[1] // 16))
    torch.testing.assert_close(got[0], by_hand_vit(net, image), atol=1e-5, rtol=1e-5)


def test_the_last_block_of_each_quarter_sees_all():
    assert global_blocks(12) == {2, 5, 8, 11}
    assert global_blocks(24) == {5, 11, 17, 23}
    assert global_blocks(3) == {0, 1, 2}


def test_offsets_stay_in_smaller_grids_and_stretch_in_larger_ones():
    down, across = torch.meshgrid(torch.arange(-3.0, 4), torch.arange(-3.0, 4), indexing="ij")
    table = torch.stack([down.abs() + across.abs(), across], dim=-1).reshape(-1, 2)
    assert fit_offsets(table, (4, 4), (4, 4)) is table
    inner = fit_offsets(table, (4, 4), (2, 3)).view(3, 5, 2)
    assert torch.equal(inner[..., 1], torch.arange(-2.0, 3).expand(3, 5))
    assert torch.equal(inner[0, :, 0], torch.tensor([3.0, 2, 1, 2, 3]))
    table = table.requires_grad_()
    outer = fit_offsets(table, (4, 4), (5, 4)).view(9, 7, 2)
    torch.testing.assert_close(outer[..., 1], torch.arange(-3.0, 4).expand(9, 7))
    # Near offsets nearly keep their value, and the farthest have that of the farthest known.
    distance = outer[:, 3, 0]
    torch.testing.assert_close(distance, distance.flip(0))
    assert distance[4].abs() < 1e-6
    assert distance[5].item() == pytest.approx(1, abs=1e-6)
    assert distance[8].item() == pytest.approx(3, abs=1e-4)
    assert (distance[4:].diff() > 0).all()
    outer.sum().backward()
    assert table.grad.abs().sum() > 0


def test_absolute_positions_take_the_images_grid():
    net = vit_of(model="clip_vit_base_patch16")
    assert features(net, torch.zeros(1, 3, 50, 90), None).shape == (1, 4, 6, 8)


def test_what_cannot_be_carried_over_is_refused():
    with pytest.raises(ConfigError, match="relative_position"):
        vit_of(relative_position="block")
    with pytest.raises(ConfigError, match="4 stages of any size"):
        strip(build("swin_base_esvit_s3", size_rule="pad"))
    with pytest.raises(ConfigError, match="'pad'"):
        strip(build("swinv2_tiny", Architecture(embed_dim=4, num_heads=(1, 1, 1, 1))))


# --- pyramids ---


@pytest.mark.parametrize("kind", ["swin", "vit"])
def test_a_pyramid_halves_from_level_to_level(kind):
    net = vit_of() if kind == "vit" else swin_of("swinv2_tiny", window_size=4, depths=(1, 1, 1, 1))
    pyramid = pyramid_of(net, 8)
    maps = pyramid(features(net, torch.randn(2, 3, 96, 160), None))
    strides = strides_of(net)
    assert strides == (4, 8, 16, 32, 64)
    for level, stride in zip(maps, strides, strict=True):
        assert level.shape == (2, 8, math.ceil(96 / stride), math.ceil(160 / stride))
    sum(level.square().sum() for level in maps).backward()
    for name, parameter in [*net.named_parameters(), *pyramid.named_parameters()]:
        assert parameter.grad is not None, name


def test_norms_of_the_stages_have_their_usual_names():
    names = dict(pyramid_of(swin_of("swinv2_tiny", depths=(1, 1, 1, 1)), 8).named_parameters())
    assert {f"norm{stage}.weight" for stage in range(4)} <= set(names)


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
