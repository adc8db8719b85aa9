"""Drop path of timm's models by rows of `keep`: timm's own to the bit, whatever recomputes it."""

from __future__ import annotations

import pytest
import timm
import torch
from tiny_timm import tiny

from fd_large.backbones.timm.timm_backbone import TimmBackbone
from fd_large.engine.block_wrappers import checkpoint_blocks, compile_blocks
from fd_large.errors import ShapeError

RATE, BATCH_SIZE = 0.5, 3
# Several rows in one drop path: mixer. Stages, windows, a rotary position: the others.
SWIN = tiny("swin_tiny_patch4_window7_224")
MODELS = {
    tiny("convnextv2_atto"): 64,
    "test_vit": 32,
    SWIN: 64,
    tiny("eva02_tiny_patch14_224"): 28,
    "small_mixer_s32_224": 224,
}
RECOMPUTED = [*((name, "every") for name in MODELS), ("test_vit", "offload"), (SWIN, "offload")]


def student(name, *, seed=0):
    torch.manual_seed(seed)
    net = TimmBackbone(name, image_size=MODELS.get(name, 32), drop_path_rate=RATE, is_trained=True)
    with torch.no_grad():  # Layer scales and norms that start small would hide mistakes.
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
    return net.train()


def inputs(net, seed=1):
    generator = torch.Generator().manual_seed(seed)
    size = MODELS.get(net.name, 32)
    images = torch.randn(BATCH_SIZE, 3, size, size, generator=generator)
    rates = torch.tensor(net.drop_path_rates)[:, None]
    return images, torch.rand(len(rates), BATCH_SIZE, generator=generator) >= rates


def gradients(net, *batches):
    """All gradients of several forwards and one backward after them."""
    net.zero_grad()
    sum(net(*batch).tokens.square().mean() for batch in batches).backward()
    return [p.grad.clone() for p in net.parameters()]


@pytest.mark.parametrize("name", MODELS)
def test_the_map_is_timms_with_the_same_draws(name, monkeypatch):
    net = student(name)
    images, keep = inputs(net)
    arguments = net._measured.arguments
    theirs = timm.create_model(name, **arguments, num_classes=0).train()
    state = {n.removeprefix("net."): t for n, t in net.state_dict().items()}
    theirs.load_state_dict(state, strict=False)
    rows = iter(keep)

    def from_rows(drawn, probability):
        return drawn.copy_(next(rows).view(drawn.shape))

    before = torch.get_rng_state()
    tokens = net(images, keep).tokens
    assert torch.equal(before, torch.get_rng_state())
    monkeypatch.setattr(torch.Tensor, "bernoulli_", from_rows)
    last = len(theirs.feature_info) - 1
    (expected,) = theirs.forward_intermediates(
        images, indices=[last], norm=True, output_fmt="NCHW", intermediates_only=True
    )
    assert next(rows, None) is None
    assert torch.equal(tokens, expected.flatten(2).transpose(1, 2))


@pytest.mark.parametrize("name", MODELS)
def test_a_row_decides_over_its_sample_alone(name):
    net = student(name)
    images, _ = inputs(net)
    keep = torch.ones(len(net.drop_path_rates), BATCH_SIZE, dtype=torch.bool)
    assert max(net.drop_path_rates) == RATE
    tokens = net(images, keep).tokens
    keep[-1, 1] = False
    changed = (net(images, keep).tokens != tokens).flatten(1).any(1)
    assert changed.tolist() == [False, True, False]
    with pytest.raises(ShapeError, match="keep"):
        net(images, keep[:-1])


@pytest.mark.parametrize(("name", "mode"), RECOMPUTED)
def test_recomputed_blocks_have_the_factors_of_the_first_time(name, mode):
    if mode == "offload":
        pytest.importorskip("fairscale")
    net = student(name)
    batches = [inputs(net, seed) for seed in (1, 2)]
    assert len(net.blocks()) >= 4
    expected = gradients(net, *batches)
    assert checkpoint_blocks(net.blocks(), mode=mode) == len(net.blocks())
    for found, grad in zip(gradients(net, *batches), expected, strict=True):
        assert torch.equal(found, grad)


def test_compiled_and_recomputed_blocks_give_the_same_gradients():
    net = student("test_vit")
    batches = [inputs(net, seed) for seed in (1, 2)]
    expected = [gradients(net, batch) for batch in batches]
    compile_blocks(net.blocks())
    checkpoint_blocks(net.blocks(), mode="every")
    for batch, grads in zip(batches, expected, strict=True):
        for found, grad in zip(gradients(net, batch), grads, strict=True):
            torch.testing.assert_close(found, grad, rtol=1e-5, atol=1e-6)
