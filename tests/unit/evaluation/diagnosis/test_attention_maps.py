"""Maps made again from q, k and bias against what the modules give out, and where tokens lie."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import timm
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.backbones.swin.swin import Swin
from fd_large.backbones.swinv2.swinv2 import SwinV2
from fd_large.backbones.timm.models import Size
from fd_large.backbones.timm.timm_backbone import TimmBackbone
from fd_large.backbones.token_positions import (
    PREFIX,
    TokenPositions,
    image_positions,
    window_positions,
)
from fd_large.backbones.vit.vit import ViT
from fd_large.evaluation.diagnosis.attention_maps import maps_to

vit = partial(ViT, 32, 2, 4, patch_size=8, image_size=(24, 32))
NETS: dict[str, tuple[Any, tuple[int, int]]] = {
    "vit": (vit, (24, 32)),
    "vit without CLS": (partial(vit, class_token=False), (24, 32)),
    "vit, distillation token": (partial(vit, distillation_token=True), (24, 32)),
    "vit, shared table": (partial(vit, relative_position="shared", qkv_bias="qv"), (24, 32)),
    "vit, own tables": (partial(vit, relative_position="block", qkv_bias="qkv"), (24, 32)),
    "vit, table, no CLS": (
        partial(vit, relative_position="block", qkv_bias="none", class_token=False),
        (24, 32),
    ),
    "swin": (partial(Swin, 16, (2, 2), (2, 4), window_size=4, image_size=32), (32, 64)),
    "swinv2": (partial(SwinV2, 16, (2, 2), (2, 4), window_size=4), (64, 32)),
    "swinv2, shared, no bias": (
        partial(SwinV2, 16, (2,), (2,), window_size=4, shared_position_bias=True, qkv_bias=False),
        (32, 32),
    ),
    "swinv2, padded": (
        partial(SwinV2, 16, (2, 2), (2, 4), window_size=4, size_rule="pad"),
        (52, 38),
    ),
    "swinv2, official windows": (
        partial(SwinV2, 16, (2, 2), (2, 4), window_size=8, size_rule="pad", window_rule="official"),
        (56, 32),
    ),
    "swin, official windows": (
        partial(
            Swin,
            16,
            (2, 2),
            (2, 4),
            window_size=4,
            image_size=32,
            size_rule="pad",
            window_rule="official",
        ),
        (16, 40),
    ),
    "timm vit": (partial(TimmBackbone, "vit_tiny_patch16_224", stride=16), (224, 224)),
    "timm deit, distilled": (
        partial(TimmBackbone, "deit_tiny_distilled_patch16_224", stride=16),
        (224, 224),
    ),
    "timm beit": (partial(TimmBackbone, "beit_small", stride=16), (64, 64)),
    "timm eva, rope": (partial(TimmBackbone, "eva02_tiny_patch14_224", stride=14), (224, 224)),
    "timm swin": (partial(TimmBackbone, "swin_small", stride=8), (64, 64)),
    "timm swinv2": (partial(TimmBackbone, "swinv2_small", stride=8), (64, 64)),
    "timm vit, relative": (
        partial(TimmBackbone, "vit_relpos_small_patch16_224", stride=16),
        (224, 224),
    ),
    "timm swin, padded": (partial(TimmBackbone, "swin_padded", stride=8), (72, 72)),
}
SMALL = {
    "beit_small": partial(
        timm.create_model, "beit_base_patch16_224", img_size=64, embed_dim=48, depth=2, num_heads=4
    ),
    "swin_small": partial(
        timm.create_model,
        "swin_tiny_patch4_window7_224",
        img_size=64,
        window_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
    ),
    "swinv2_small": partial(
        timm.create_model,
        "swinv2_tiny_window8_256",
        img_size=64,
        window_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
    ),
    "swin_padded": partial(
        timm.create_model,
        "swin_tiny_patch4_window7_224",
        img_size=72,
        window_size=4,
        embed_dim=16,
        depths=(2, 2),
        num_heads=(2, 4),
        strict_img_size=False,
    ),
}


def build(name: str, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, tuple[int, int]]:
    """A model whose attention is far from uniform, and the size of its images."""

    def create(name: str) -> nn.Module:
        net = SMALL[name]()
        net.pretrained_cfg = {"input_size": (3, *size)}
        return net

    make, size = NETS[name]
    if make.args and make.args[0] in SMALL:
        # timm knows no model of these names.
        for module in ("timm_backbone", "models"):
            monkeypatch.setattr(f"fd_large.backbones.timm.{module}.create", create)
            monkeypatch.setattr(
                f"fd_large.backbones.timm.{module}.sized",
                lambda name, image_size: Size(size[0], {}, is_only=False),
            )
    torch.manual_seed(0)
    net = make().eval()
    with torch.no_grad():
        for key, parameter in net.named_parameters():
            if any(part in key for part in ("qkv.weight", "q_proj.weight", "k_proj.weight")):
                parameter.normal_(0, parameter.shape[1] ** -0.5)
            elif any(part in key for part in ("bias_table", "q_bias", "k_bias", "v_bias")):
                parameter.normal_()
            elif "cpb_mlp" in key:
                parameter.normal_(0, 0.2)
    return net, size


def values(module: nn.Module, x: Tensor) -> Tensor:
    """v of a module's input, (..., C)."""
    if getattr(module, "v_proj", None) is not None:
        return module.v_proj(x)
    width = len(module.qkv.weight) // 3
    bias = module.qkv.bias
    bias = getattr(module, "v_bias", None) if bias is None else bias[2 * width :]
    return F.linear(x, module.qkv.weight[2 * width :], bias)


def in_windows(x: Tensor, positions: TokenPositions) -> Tensor:
    """(B, H * W, C) by true positions: (B, nW, T, C), padding 0."""
    return F.pad(x, (0, 0, 0, 1))[:, positions.index.clamp(min=-1)]


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("name", NETS)
def test_maps_times_values_are_what_the_modules_give_out(
    name: str, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not fused and not name.startswith("timm"):
        return  # One way on the CPU.
    net, size = build(name, monkeypatch)
    seen: dict[str, tuple[Tensor, TokenPositions]] = {}
    inputs: dict[str, Tensor] = {}
    modules = dict(net.named_modules())
    for key, module in modules.items():
        if hasattr(module, "fused_attn"):
            module.fused_attn = fused
        if key.endswith(("attn", "proj")) or f"{key}.attn" in modules:
            module.register_forward_pre_hook(
                lambda m, given, key=key: inputs.update({key: given[0].clone()})
            )

    images = torch.randn(2, 3, *size)
    with torch.no_grad():
        plain = net(images).tokens
        with maps_to(lambda key, *what: seen.update({key: what}), net, net.grid(*size)):
            again = net(images).tokens
    assert torch.equal(plain, again)
    attentions = [key for key in modules if key.endswith("attn")]
    assert list(seen) == attentions
    assert attentions
    for key in attentions:
        module, (attention, positions) = modules[key], seen[key]
        torch.testing.assert_close(attention.sum(-1), torch.ones(attention.shape[:-1]))
        assert attention.max() > 3 / attention.shape[-1]
        output, given = inputs[f"{key}.proj"], inputs[key]
        block = key.rpartition(".")[0]
        if name.startswith("timm swin"):
            # In the image's order, from before the block makes windows.
            given = inputs[block] if "v2" in name else modules[f"{block}.norm1"](inputs[block])
            output = output.unflatten(0, (len(images), -1))
        one = positions.window == positions.grid and bool(positions.whole[0])
        if positions.index[0, 0] == PREFIX or one:
            v, output = values(module, given).flatten(1, -2), output.reshape(len(images), -1, 1)
            v, output = v[:, None], output.view(len(images), 1, v.shape[-2], -1)
        else:
            v = in_windows(values(module, given.flatten(1, 2)), positions)
            if "official" in name or ("pad" in name and "timm" in name):
                # What pads these has a value: the bias.
                padding = (positions.index < 0)[None, :, :, None]
                v = torch.where(padding, values(module, torch.zeros_like(v)), v)
            if not name.startswith("timm"):
                output = in_windows(output.flatten(1, 2), positions)
        heads = v.unflatten(-1, (attention.shape[2], -1)).transpose(2, 3)  # (B, nW, h, T, D)
        product = (attention @ heads).transpose(2, 3).flatten(3)
        there = positions.index != -1
        error = (product - output)[:, there].abs().max()
        assert error < 1e-5 * max(1.0, float(output.abs().max())), (key, float(error))


def test_a_vit_block_in_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    net, _ = build("vit, table, no CLS", monkeypatch)
    attn, x, grid = net.blocks[0].attn, torch.randn(2, 12, 32), (3, 4)
    attn.relative_position_bias_table = nn.Parameter(torch.randn(9, 4))  # For windows of 2 x 2.
    seen: list[tuple[Tensor, TokenPositions]] = []
    outputs: list[Tensor] = []
    attn.proj.register_forward_pre_hook(lambda module, given: outputs.append(given[0]))
    with torch.no_grad(), maps_to(lambda name, *what: seen.append(what), attn, grid):
        attn(x, None, grid, 2)
        (attention, positions), v = seen[0], in_windows(values(attn, x), seen[0][1])
        heads = v.unflatten(-1, (4, -1)).transpose(2, 3)
    product = (attention @ heads).transpose(2, 3).flatten(3)
    error = (product - in_windows(outputs[0], positions))[:, positions.index >= 0].abs().max()
    assert error < 1e-5


def test_shifted_windows_know_where_their_tokens_are() -> None:
    positions = window_positions((4, 4), (2, 2), (1, 1), pad_first=True)
    # Rolled by one, the first window starts at row 1, column 1; the last has the four corners.
    assert positions.index.tolist() == [
        [5, 6, 9, 10],
        [7, 4, 11, 8],
        [13, 14, 1, 2],
        [15, 12, 3, 0],
    ]
    assert positions.whole.tolist() == [True, False, False, False]


def test_padding_has_no_place() -> None:
    for pad_first in (True, False):
        positions = window_positions((3, 2), (2, 2), (0, 0), pad_first=pad_first)
        assert positions.index.tolist() == [[0, 1, 2, 3], [4, 5, -1, -1]]
        assert positions.whole.tolist() == [True, False]


def test_prefix_tokens_come_first() -> None:
    assert image_positions((1, 2), 2).index.tolist() == [[-2, -2, 0, 1]]


def test_a_convolutional_net_has_no_attention() -> None:
    net = TimmBackbone("test_efficientnet", stride=16).eval()
    seen: list[str] = []
    with torch.no_grad(), maps_to(lambda name, *_: seen.append(name), net, (4, 4)):
        net(torch.randn(1, 3, 64, 64))
    assert not seen


def test_windows_of_an_unknown_kind_are_left_out() -> None:
    # MaxViT's windows have as many tokens as its last map.
    net = TimmBackbone("test_maxvit", stride=32).eval()
    seen: list[tuple[str, int]] = []
    size = net.fixed_size
    with (
        torch.no_grad(),
        maps_to(
            lambda name, maps, positions: seen.append((name, len(maps))), net, net.grid(size, size)
        ),
    ):
        net(torch.randn(2, 3, size, size))
    last = max(int(name.split(".")[2]) for name, _ in named_attention(net))
    assert seen
    assert all(name.startswith(f"net.stages.{last}.") and batch == 2 for name, batch in seen)


def named_attention(net: nn.Module) -> list[tuple[str, nn.Module]]:
    return [(n, m) for n, m in net.named_modules() if "Attention" in type(m).__name__]
