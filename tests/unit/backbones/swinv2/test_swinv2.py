from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fd_large.backbones.swinv2.swinv2 import SwinV2
from fd_large.backbones.windows import coordinate_table
from fd_large.engine.block_wrappers import checkpoint_blocks
from fd_large.errors import ConfigError, ShapeError


def tiny(**options) -> SwinV2:
    torch.manual_seed(0)
    options = {"window_size": 4, "mlp_ratio": 2.0, "patch_size": 2} | options
    depths = options.pop("depths", (2, 2))
    heads = tuple(2 * 2**s for s in range(len(depths)))
    net = SwinV2(8, depths, heads, **options)
    with torch.no_grad():  # Norms that end a branch start near zero and would hide mistakes.
        for name, parameter in net.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3 + 0.5)
            if "cpb_mlp" in name:
                parameter.mul_(20)
    return net


# --- names and shapes ---


def test_names_are_the_official_ones():
    names = set(dict(tiny(extra_norm_every=2).named_parameters()))
    assert {
        "patch_embed.proj.weight",
        "patch_embed.norm.bias",
        "layers.0.blocks.1.attn.logit_scale",
        "layers.0.blocks.1.attn.q_bias",
        "layers.0.blocks.1.attn.v_bias",
        "layers.0.blocks.1.attn.qkv.weight",
        "layers.0.blocks.1.attn.cpb_mlp.0.weight",
        "layers.0.blocks.1.attn.cpb_mlp.2.weight",
        "layers.0.blocks.1.attn.proj.bias",
        "layers.0.blocks.1.norm1.weight",
        "layers.0.blocks.1.mlp.fc2.bias",
        "layers.0.blocks.1.extra_norm.weight",
        "layers.0.downsample.reduction.weight",
        "layers.0.downsample.norm.weight",
        "norm.bias",
    } <= names
    assert "layers.0.blocks.0.attn.qkv.bias" not in names
    assert "layers.0.blocks.0.extra_norm.weight" not in names
    assert not list(tiny().named_buffers())


def test_shared_position_bias_has_one_mlp_a_stage():
    names = set(dict(tiny(shared_position_bias=True).named_parameters()))
    assert "layers.1.position_bias.cpb_mlp.2.weight" in names
    assert not any(".attn.cpb_mlp" in name for name in names)


def test_extra_norms_count_within_a_stage():
    net = tiny(depths=(2, 7), extra_norm_every=3)
    assert [i for i, block in enumerate(net.blocks()) if block.extra_norm is not None] == [4, 7]


@pytest.mark.parametrize("depths", [(1,), (1, 2, 1), (1, 1, 1, 1, 1)])
def test_any_number_of_stages(depths):
    net = tiny(depths=depths)
    side = net.stride * 2
    feature_map = net(torch.randn(1, 3, side, side))
    assert feature_map.grid == net.grid(side, side) == (2, 2)
    assert feature_map.tokens.shape == (1, 4, net.width)
    assert feature_map.num_prefix_tokens == 0
    assert len(net.drop_path_rates) == 2 * sum(depths)


def test_final_norm_covers_all_tokens():
    net = tiny()
    with torch.no_grad():
        net.norm.weight.fill_(1.0)
        net.norm.bias.zero_()
    tokens = net(torch.randn(1, 3, 16, 16)).tokens
    torch.testing.assert_close(tokens.mean(-1), torch.zeros(1, 16), atol=1e-5, rtol=0)


def test_pretrained_windows_scale_the_coordinates():
    images = torch.randn(1, 3, 16, 16)
    a, b = tiny(), tiny(pretrained_window_sizes=(12, 6))
    assert not torch.allclose(a(images).tokens, b(images).tokens, atol=1e-5)
    c = tiny(pretrained_window_sizes=(4, 4))
    assert torch.equal(a(images).tokens, c(images).tokens)


# --- sizes ---


def test_drop_cuts_the_remainder_of_the_patch_grid():
    net, images = tiny(), torch.randn(1, 3, 17, 33)
    assert net.grid(17, 33) == (4, 8)
    assert torch.equal(net(images).tokens, net(images[:, :, :16, :32]).tokens)


@pytest.mark.parametrize(
    ("size", "match"),
    [
        ((20, 16), r"stage 0: the map does not divide.*10x8.*window 4"),
        ((24, 24), r"stage 1: the map does not divide.*6x6.*window 4"),
        ((6, 6), r"stage 0: patch merging needs even sides.*3x3"),
        ((1, 16), r"patch_embed.*1x16.*2x2"),
    ],
)
def test_misfits_name_place_numbers_and_remedy(size, match):
    with pytest.raises(ShapeError, match=match) as caught:
        tiny()(torch.zeros(1, 3, *size))
    assert "size_rule pad" in str(caught.value)
    assert "16" in str(caught.value)


def test_padding_changes_nothing_where_sizes_fit():
    images = torch.randn(2, 3, 32, 16)
    assert torch.equal(tiny()(images).tokens, tiny(size_rule="pad")(images).tokens)


def dense_block(block, x, table_of):
    """A block on (H, W, C) by attention over all pairs of tokens, without rolls or windows."""
    attn = block.attn
    height, width, channels = x.shape
    window = min(block.windows.side, height, width)
    odd = block.parity == 1
    shift = window // 2 if odd and min(height, width) > block.windows.side else 0
    padded = [-(-n // window) * window for n in (height, width)]
    y, x_ = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    y, x_ = y.reshape(-1), x_.reshape(-1)
    rolled = [(p - shift) % n for p, n in zip((y, x_), padded, strict=True)]
    wrapped = [p < shift for p in (y, x_)]
    same_window = torch.ones(height * width, height * width, dtype=torch.bool)
    torn = torch.zeros_like(same_window)
    offset = []
    for r, w in zip(rolled, wrapped, strict=True):
        same_window &= (r // window)[:, None] == (r // window)[None]
        torn |= w[:, None] != w[None]
        offset.append((r[:, None] - r[None]).clamp(1 - window, window - 1) + window - 1)
    bias = table_of(attn, window)[offset[0] * (2 * window - 1) + offset[1]].permute(2, 0, 1)
    tokens = x.reshape(-1, channels)
    qkv = F.linear(
        tokens,
        attn.qkv.weight,
        torch.cat([attn.q_bias, torch.zeros_like(attn.q_bias), attn.v_bias]),
    )
    q, k, v = qkv.view(-1, 3, attn.num_heads, channels // attn.num_heads).permute(1, 2, 0, 3)
    logits = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-2, -1)
    logits = logits * attn.logit_scale.exp() + bias - 100.0 * torn
    logits = logits.masked_fill(~same_window, -torch.inf)
    out = (logits.softmax(-1) @ v).transpose(0, 1).reshape(-1, channels)
    tokens = tokens + plain_norm(block.norm1, F.linear(out, attn.proj.weight, attn.proj.bias))
    hidden = F.gelu(F.linear(tokens, block.mlp.fc1.weight, block.mlp.fc1.bias))
    tokens = tokens + plain_norm(
        block.norm2, F.linear(hidden, block.mlp.fc2.weight, block.mlp.fc2.bias)
    )
    return tokens.view(x.shape)


def plain_norm(norm, x):
    return F.layer_norm(x, norm.weight.shape, norm.weight, norm.bias, norm.eps)


def cpb_table(attn, window):
    first, _, second = attn.cpb_mlp
    coordinates = coordinate_table(window, 0, torch.device("cpu")).to(first.weight.dtype)
    hidden = F.relu(F.linear(coordinates, first.weight, first.bias))
    return 16 * torch.sigmoid(F.linear(hidden, second.weight))


def by_hand(net, image):
    """The padded model on one image (3, H, W): what is padding never enters a softmax."""
    p = net.patch_size
    height, width = image.shape[1:]
    image = F.pad(image, (0, -width % p, 0, -height % p))
    x = F.conv2d(image[None], net.patch_embed.proj.weight, net.patch_embed.proj.bias, stride=p)
    x = plain_norm(net.patch_embed.norm, x[0].permute(1, 2, 0))
    for stage in net.layers:
        for block in stage.blocks:
            x = dense_block(block, x, cpb_table)
        if stage.downsample is not None:
            rows, columns, channels = x.shape
            even = torch.zeros(rows + rows % 2, columns + columns % 2, channels, dtype=x.dtype)
            even[:rows, :columns] = x
            four = [even[0::2, 0::2], even[1::2, 0::2], even[0::2, 1::2], even[1::2, 1::2]]
            x = F.linear(torch.cat(four, -1), stage.downsample.reduction.weight)
            x = plain_norm(stage.downsample.norm, x)
    return plain_norm(net.norm, x)


def test_rules_of_windows_fit_the_model_and_the_rule_of_sizes():
    rules = {"window_rule": "official", "size_rule": "pad"}
    with pytest.raises(ConfigError, match=r"window_rule.*size_rule 'drop'"):
        tiny(window_rule="official")
    with pytest.raises(ConfigError, match=r"shift_stages.*got 3.*2 stages"):
        tiny(**rules, shift_stages=(True, True, False))
    with pytest.raises(ConfigError, match=r"stage_windows.*got 1.*2 stages"):
        tiny(**rules, stage_windows=(4,))


def test_the_official_rule_changes_nothing_where_windows_divide_maps_of_several():
    images = torch.randn(1, 3, 64, 32)
    official = tiny(size_rule="pad", window_rule="official")(images).tokens
    assert torch.equal(official, tiny()(images).tokens)


@pytest.mark.parametrize("size", [(27, 35), (16, 16), (23, 9), (41, 18), (19, 50)])
def test_pad_equals_attention_over_real_tokens_only(size):
    net = tiny(size_rule="pad", depths=(2, 2, 2)).double()
    images = torch.randn(2, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        feature_map = net(images)
        for b in range(2):
            expected = by_hand(net, images[b])
            assert feature_map.grid == tuple(expected.shape[:2]) == net.grid(*size)
            torch.testing.assert_close(
                feature_map.tokens[b], expected.flatten(0, 1), atol=1e-9, rtol=1e-9
            )


def test_window_of_one_token_is_finite():
    net = tiny(depths=(1, 1, 1))
    images = torch.randn(1, 3, 8, 8)  # Maps of 4, 2 and 1 tokens a side.
    tokens = net(images).tokens
    tokens.sum().backward()
    assert torch.isfinite(tokens).all()
    assert all(torch.isfinite(p.grad).all() for p in net.parameters() if p.grad is not None)


def test_absolute_positions_fit_one_size():
    net = tiny(absolute_position=True, image_size=(16, 32))
    assert net.absolute_pos_embed.shape == (1, 8 * 16, 8)
    net(torch.zeros(1, 3, 16, 32))
    with pytest.raises(ShapeError, match="absolute positions"):
        net(torch.zeros(1, 3, 16, 16))
    with pytest.raises(ConfigError, match="image_size"):
        tiny(absolute_position=True)


# --- memory and precision ---


def test_sequential_stages_change_nothing_but_memory():
    images = torch.randn(1, 3, 32, 32)
    plain, sequential = tiny(), tiny(sequential_stages=1)
    assert [block.attn.memory for block in sequential.blocks()] == ["sequential"] * 2 + ["keep"] * 2
    torch.testing.assert_close(sequential(images).tokens, plain(images).tokens)


def test_a_frozen_net_makes_its_position_tables_once():
    net, images = tiny().requires_grad_(False), torch.randn(1, 3, 32, 32)
    calls = []
    for block in net.blocks():
        block.attn.cpb_mlp.register_forward_hook(lambda *_: calls.append(1))
    first = net(images).tokens
    assert torch.equal(net(images).tokens, first)
    assert len(calls) == 4
    with torch.no_grad():
        net.blocks()[0].attn.cpb_mlp[2].weight.neg_()
    assert not torch.equal(net(images).tokens, first)
    assert len(calls) == 5


def test_position_tables_are_made_once_a_step_under_activation_checkpointing():
    net = tiny()
    calls = []
    for block in net.blocks():
        block.attn.cpb_mlp.register_forward_hook(lambda *_: calls.append(1))
    checkpoint_blocks(net.blocks(), mode="every")
    net(torch.randn(1, 3, 32, 32)).tokens.sum().backward()
    assert len(calls) == 4
    assert all(block.attn.cpb_mlp[2].weight.grad is not None for block in net.blocks())


def test_position_bias_is_float32_in_a_bfloat16_net():
    net = tiny(shared_position_bias=True).bfloat16()
    device = torch.device("cpu")
    assert net.layers[0].position_bias(4, 0, device).dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert net.layers[0].position_bias(4, 0, device).dtype == torch.float32


def test_exempt_from_weight_decay():
    net = tiny()
    assert net.no_weight_decay() == {"absolute_pos_embed"}
    assert net.no_weight_decay_keywords() == (
        "cpb_mlp",
        "logit_scale",
        "relative_position_bias_table",
    )
