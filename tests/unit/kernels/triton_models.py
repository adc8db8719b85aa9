"""Whole small models, forward and backward, on the kernels; started by test_triton.py."""

from __future__ import annotations

import pytest
import torch

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.swin.swin import Swin
from fd_large.backbones.swinv2.swinv2 import SwinV2
from fd_large.backbones.vit.vit import ViT
from fd_large.engine.block_wrappers import checkpoint_blocks
from fd_large.tasks.distillation.objective import make_target
from fd_large.tasks.distillation.task import Distillation

NETS = {
    "swinv2": lambda **options: SwinV2(
        32, (2, 1), (1, 2), window_size=4, drop_path_rate=0.5, extra_norm_every=2, **options
    ),
    "swin": lambda **options: Swin(
        32, (2, 1), (1, 2), window_size=4, image_size=32, drop_path_rate=0.5, **options
    ),
    "vit": lambda **options: ViT(
        32,
        2,
        1,
        patch_size=8,
        image_size=32,
        absolute_position=False,
        relative_position="shared",
        layer_scale=0.1,
        qkv_bias="qv",
        drop_path_rate=0.5,
        **options,
    ),
}
EXPECTED = {
    "swinv2": {"layer_norm", "residual_norm", "window_attention"},
    "swin": {"layer_norm", "add_norm", "window_attention"},
    "vit": {"layer_norm", "add_norm", "window_attention"},
}


def step(net, device, *, checkpointed=False):
    """Loss, and gradients by name, of a distillation step."""
    generator = torch.Generator().manual_seed(2)
    pixels = torch.randn(2, 3, 32, 32, generator=generator).to(device)
    # One of the two images skips every branch but the first, whose rate is 0.
    keep = torch.ones(len(net.drop_path_rates), 2, dtype=torch.bool)
    keep[2::2, 1] = keep[3::2, 0] = False
    grid, prefix = net.grid(32, 32), net.num_prefix_tokens
    target = torch.randn(2, prefix + grid[0] * grid[1], 40, generator=generator).to(device)
    torch.manual_seed(3)
    task = Distillation(net, {"": lambda images: images}, [make_target(net.width, 40)]).to(device)
    task.projection.to(next(net.parameters()).dtype)
    if checkpointed:
        checkpoint_blocks(net.blocks(), mode="every")
    loss, _ = task(pixels=pixels, keep=keep, maps={"": FeatureMap(target, grid, prefix)})
    loss.backward()
    return loss.detach(), {name: p.grad for name, p in task.named_parameters()}


def build(family, device, **options):
    torch.manual_seed(0)
    net = NETS[family](**options)
    with torch.no_grad():
        for parameter in net.parameters():
            # So that no branch is silent and no gradient zero.
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return net.to(device)


@pytest.mark.parametrize(
    ("family", "checkpointed"),
    [
        pytest.param("swinv2", False, id="swinv2"),
        pytest.param("swin", False, id="swin", marks=pytest.mark.sweep),
        pytest.param("vit", True, id="vit, checkpointed"),
    ],
)
def test_a_step_agrees_with_the_reference(family, checkpointed, device, chosen, monkeypatch):
    options = {"attention_memory": "recompute"}
    loss, gradients = step(build(family, device, **options), device, checkpointed=checkpointed)
    made = {op: choice for op, choice in chosen if op in EXPECTED[family]}
    assert made == dict.fromkeys(EXPECTED[family], "triton")
    monkeypatch.setenv("FD_KERNELS", "reference")
    expected, references = step(build(family, device, **options), device)
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=1e-5)
    assert gradients.keys() == references.keys()
    for name, reference in references.items():
        largest = reference.abs().max().item()
        assert largest > 0, name
        assert (gradients[name] - reference).abs().max() <= 1e-4 * largest + 1e-7, name


@pytest.mark.parametrize("family", [pytest.param("swinv2", marks=pytest.mark.sweep), "vit"])
def test_a_step_with_bfloat16_weights_and_a_float32_stream(family, device, monkeypatch):
    options = {"attention_memory": "recompute", "residual_dtype": "float32"}

    def gradients(dtype):
        loss, found = step(build(family, device, **options).to(dtype), device)
        assert all(gradient.dtype == dtype for gradient in found.values())
        return {"loss": loss.view(1).double()} | {n: g.double() for n, g in found.items()}

    got = gradients(torch.bfloat16)
    monkeypatch.setenv("FD_KERNELS", "reference")
    eager, exact = gradients(torch.bfloat16), gradients(torch.float64)
    # Each tensor as far from float64 as eager torch in the same dtypes, by its norm: twice that
    # where the interpreter truncates, and one unit of bfloat16 in the last place.
    for name, reference in exact.items():
        error, of_eager = (found[name] - reference for found in (got, eager))
        bound = 2 * of_eager.norm() + 2**-7 * reference.norm()
        assert error.norm() <= bound, f"{name}: {error.norm()} > {bound}"
