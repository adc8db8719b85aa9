"""What every backbone that can be trained owes to the engine, whatever its family."""

from __future__ import annotations

import pytest
import torch

from fd_large.backbones.registry import FAMILIES, build, family_of
from fd_large.errors import ConfigError
from fd_large.recipes.architectures import Architecture, resolve

WINDOWED = {"embed_dim": 8, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
PLAIN = {"embed_dim": 16, "depths": (2,), "num_heads": (2,), "patch_size": 4}
MODELS = {
    "swinv2": ("swinv2_tiny", {**WINDOWED, "patch_size": 2}),
    "swinv2 with shared biases and extra norms": (
        "swinv2_tiny",
        {**WINDOWED, "patch_size": 2, "shared_position_bias": True, "extra_norm_every": 1},
    ),
    "swin": ("swin_base_esvit", {**WINDOWED, "patch_size": 2}),
    "vit with a shared table": ("vit_base_patch16", PLAIN),
    "vit with tables": ("vit_base_patch16", {**PLAIN, "relative_position": "block"}),
    "plain vit": ("dino_vit_base_patch16", PLAIN),
}
SIDE = 32


def small(what, **options):
    name, fields = MODELS[what]
    options = {"initialization": "official", "seed": 0} | options
    net = build(name, Architecture(image_size=SIDE, **fields), **options)
    torch.manual_seed(1)
    with torch.no_grad():  # Norms that end a branch start at zero and would hide mistakes.
        for parameter in net.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3 + 0.5)
    return net


@pytest.mark.parametrize("what", MODELS)
def test_the_map_and_what_is_said_of_it(what):
    net = small(what)
    images = torch.randn(2, 3, SIDE, SIDE)
    feature_map = net(images)
    rows, columns = net.grid(SIDE, SIDE)
    assert feature_map.grid == (rows, columns) == (SIDE // net.stride,) * 2
    tokens = net.num_prefix_tokens + rows * columns
    assert feature_map.num_prefix_tokens == net.num_prefix_tokens
    assert feature_map.tokens.shape == (2, tokens, net.width)
    architecture = resolve(MODELS[what][0], Architecture(**MODELS[what][1]))
    assert (architecture.width, architecture.num_prefix_tokens) == (
        net.width,
        net.num_prefix_tokens,
    )
    if architecture.is_hierarchical:
        maps = net.stages(images)
        assert [m.shape[-1] for m in maps] == [8, 16]
        torch.testing.assert_close(net.norm(maps[-1]).flatten(1, 2), feature_map.tokens)


@pytest.mark.parametrize("what", MODELS)
def test_layers_rise_from_the_embedding_to_the_last(what):
    net = small(what)
    layers = {name: net.layer_id(name) for name, _ in net.named_parameters()}
    assert set(layers.values()) == set(range(net.last_layer + 1))
    assert layers["patch_embed.proj.weight"] == 0
    assert layers["norm.weight"] == net.last_layer == len(net.blocks()) + 1
    owners = {id(p): i for i, block in enumerate(net.blocks(), 1) for p in block.parameters()}
    for name, parameter in net.named_parameters():
        if id(parameter) in owners:
            assert layers[name] == owners[id(parameter)]
        elif ".downsample." in name:
            assert layers[name] == 2


@pytest.mark.parametrize(
    ("residual", "dtype"), [("compute", torch.bfloat16), ("float32", torch.float32)]
)
@pytest.mark.parametrize("what", MODELS)
def test_bfloat16_runs_with_either_residual_stream(what, residual, dtype):
    net = small(what, residual_dtype=residual, attention_memory="recompute")
    images = torch.randn(2, 3, SIDE, SIDE)
    exact = net(images).tokens
    net.bfloat16()
    streams = []
    for block in net.blocks():
        block.register_forward_hook(lambda m, i, output: streams.append(output))
    tokens = net(images).tokens
    tokens.float().square().sum().backward()
    for stream in streams:
        if isinstance(stream, tuple):  # And what the products take of it.
            stream, narrow = stream
            assert narrow.dtype == torch.bfloat16
        assert stream.dtype == dtype
    assert tokens.dtype == dtype
    assert all(p.grad is not None for p in net.parameters())
    assert (tokens.float() - exact).abs().mean() < 0.05 * exact.abs().mean()


@pytest.mark.parametrize("what", MODELS)
def test_recompute_saves_no_attention_map_and_equals_keep(what):
    gradients, counts = {}, {}
    for memory in ("keep", "recompute"):
        net, kept = small(what, attention_memory=memory), []

        def pack(tensor, kept=kept):
            if tensor.dim() > 3 and 16 <= tensor.shape[-1] == tensor.shape[-2] != SIDE:
                kept.append(tensor.dtype)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = net(torch.ones(1, 3, SIDE, SIDE).cumsum(-1)).tokens.square().sum()
        loss.backward()
        gradients[memory], counts[memory] = [p.grad for p in net.parameters()], len(kept)
    assert counts["keep"] >= len(net.blocks())  # The softmax of each block.
    assert counts["recompute"] == 0
    for a, b in zip(*gradients.values(), strict=True):
        assert torch.equal(a, b)


def test_an_unknown_family_is_an_error_with_the_nearest():
    model = resolve("vit_base_patch16")
    unheard = type("Unheard", (type(model),), {"family": "vti"})(**vars(model))
    with pytest.raises(ConfigError, match="nearest: vit"):
        build(unheard)


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_says_without_torch_is_what_it_is_registered_under(name):
    family = FAMILIES[name]
    assert family.architecture.family == name
    if name != "module":  # A function of the user's.
        assert family_of(resolve(family.architecture.example)) is family


@pytest.mark.parametrize("what", ["plain vit", "swin"])
def test_options_that_a_family_lacks_are_refused_or_ignored(what):
    name, fields = MODELS[what]
    if not resolve(name).can_pad:
        with pytest.raises(ConfigError, match=r"student\.size_rule"):
            build(name, Architecture(**fields), size_rule="pad")
        with pytest.raises(ConfigError, match=r"student\.window_rule.*not available"):
            build(name, Architecture(**fields), window_rule="official")
    else:
        with pytest.raises(ConfigError, match=r"student\.stage_windows.*position tables"):
            build(name, Architecture(**fields), stage_windows=(4, 2))
    assert not resolve(name).has_sequential_stages
