"""A frozen model: uint8 images to its map, in its own statistics, size and precision."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from loading import TINY, TINY_VIT, made, saved

from fd_large.backbones.statistics import IMAGENET, OPENAI_CLIP, Statistics, normalise
from fd_large.backbones.vit.vit import ViT
from fd_large.engine.frozen import Frozen, built_from, frozen_maker, frozen_weights
from fd_large.errors import ConfigError, WeightsError
from fd_large.recipes.sections import FrozenModel
from fd_large.weights.resolve import Sources

IMAGES = torch.randint(
    0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)
)


def test_it_normalises_and_has_no_gradient():
    net = made("dino_vit_base_patch16").train()
    frozen = Frozen(net, OPENAI_CLIP)
    found = frozen(IMAGES)
    assert torch.equal(found.tokens, net(normalise(IMAGES, OPENAI_CLIP)).tokens)
    assert not torch.equal(found.tokens, net(normalise(IMAGES, IMAGENET)).tokens)
    assert not found.tokens.requires_grad
    assert not any(p.requires_grad for p in frozen.parameters())
    # Whatever contains it goes into training mode, it does not.
    torch.nn.Sequential(frozen).train()
    assert not net.training
    assert (frozen.width, frozen.grid(32)) == (32, (4, 4))


def test_it_sees_its_own_size_and_its_own_statistics():
    net = ViT(8, 1, 1, patch_size=8, image_size=32, absolute_position=True)
    seen = []
    net.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    frozen = Frozen(net, OPENAI_CLIP, image_size=32)
    assert frozen.grid(48) == (4, 4)
    frozen(torch.full((1, 3, 48, 48), 255, dtype=torch.uint8))
    expected = (1 - torch.tensor(OPENAI_CLIP.mean)) / torch.tensor(OPENAI_CLIP.std)
    assert seen[0].shape == (1, 3, 32, 32)
    torch.testing.assert_close(seen[0].mean((0, 2, 3)), expected, atol=1e-5, rtol=0)


def test_it_computes_in_the_type_of_its_weights():
    frozen = Frozen(made("dino_vit_base_patch16"), IMAGENET)
    exact = frozen(IMAGES).tokens
    low = frozen.bfloat16()(IMAGES).tokens
    assert low.dtype == torch.bfloat16
    torch.testing.assert_close(low.float(), exact, atol=0.1, rtol=0.1)


@pytest.mark.parametrize("model", ["dino_vit_base_patch16", "swin_base_esvit"])
def test_the_map_before_the_final_norm_is_what_that_norm_is_given(model):
    section = FrozenModel(model=model, architecture=TINY[model], source="random")
    last = frozen_maker(section, image_size=32)()
    before = frozen_maker(section, image_size=32, before_norm=True)()
    # The same weights, the norm's included.
    before.load_state_dict(last.state_dict())
    torch.nn.init.normal_(last.net.norm.weight)
    found, normed = before(IMAGES), last(IMAGES)
    assert (found.grid, found.num_prefix_tokens) == (normed.grid, normed.num_prefix_tokens)
    assert torch.equal(last.net.norm(found.tokens), normed.tokens)


def test_other_models_have_no_map_before_their_norm():
    section = FrozenModel(model="timm:test_vit", source="timm:test_vit=random")
    with pytest.raises(ConfigError, match=r"objective\.layer: .* before_norm for timm:test_vit"):
        frozen_maker(section, image_size=32, before_norm=True)


def test_a_stream_in_float32_is_nearer_to_the_exact_map():
    section = FrozenModel(
        model="dino_vit_base_patch16", architecture=TINY["dino_vit_base_patch16"], source="random"
    )
    exact = frozen_maker(section, image_size=32)()
    errors = {}
    for dtype in ("compute", "float32"):
        low = frozen_maker(section, image_size=32, residual_dtype=dtype)()
        low.load_state_dict(exact.state_dict())
        found = low.bfloat16()(IMAGES).tokens
        assert found.dtype == (torch.bfloat16 if dtype == "compute" else torch.float32)
        errors[dtype] = (found.float() - exact(IMAGES).tokens).square().mean()
    assert errors["float32"] < errors["compute"]


@pytest.mark.parametrize(
    ("model", "own", "grid", "image_size"),
    [
        # A table of positions allows one size alone.
        ("dino_vit_base_patch16", 0, (4, 4), 32),
        ("dino_vit_base_patch16", 32, (4, 4), 32),
        ("swin_base_esvit", 0, (16, 16), 0),
        ("swin_base_esvit", 32, (8, 8), 32),
    ],
)
def test_a_section_becomes_a_model_of_its_statistics(model, own, grid, image_size):
    numbers = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6)
    section = FrozenModel(
        model=model, architecture=TINY[model], source="random", statistics=numbers
    )
    frozen = frozen_maker(section, image_size=64, own_image_size=own)()
    assert frozen.statistics == Statistics(numbers[:3], numbers[3:])
    assert frozen.grid(64) == grid
    assert frozen.image_size == image_size
    unstated = FrozenModel(model="clip_vit_base_patch16", architecture=TINY_VIT, source="random")
    assert frozen_maker(unstated, image_size=32)().statistics == OPENAI_CLIP


def test_its_weights_are_a_file_or_none(tmp_path):
    net = made("dino_vit_base_patch16")
    torch.save(net.state_dict(), tmp_path / "net.pth")
    section = FrozenModel(
        model="dino_vit_base_patch16", architecture=TINY_VIT, source=str(tmp_path / "net.pth")
    )
    found = dict(frozen_weights(section, Sources(), where="--teacher.source"))
    assert all(torch.equal(value, found[name]) for name, value in net.state_dict().items())
    random = FrozenModel(model="dino_vit_base_patch16", source="random")
    assert frozen_weights(random, Sources(), where="--teacher.source") is None
    nothing = FrozenModel(model="dino_vit_base_patch16")
    with pytest.raises(ConfigError, match=r"--net\.source"):
        frozen_weights(nothing, Sources(), where="--net.source")
    # As where the name of one of several is mistyped.
    nameless = FrozenModel(model="auto", source="")
    with pytest.raises(ConfigError, match=r"teachers\.corse: "):
        frozen_weights(nameless, Sources(), where="--teachers.corse.source")
    del found["norm.bias"]
    torch.save(found, tmp_path / "part.pth")
    section = replace(section, source=str(tmp_path / "part.pth"))
    with pytest.raises(WeightsError, match=r"norm\.bias.*--teacher\.allow"):
        frozen_weights(section, Sources(), where="--teacher.source")


def pages_of(path):
    """The address ranges at which this process has a file in its memory."""
    lines = Path("/proc/self/maps").read_text().splitlines()
    spans = (line.split()[0].split("-") for line in lines if line.endswith(str(path)))
    return [(int(begin, 16), int(end, 16)) for begin, end in spans]


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
@pytest.mark.parametrize("model", ["swinv2_huge", "dino_vit_base_patch16"])
def test_a_frozen_model_holds_its_file_or_a_copy_in_its_own_type(model, suffix, stored, tmp_path):
    net = made(model).to(stored)
    path = saved(net, tmp_path / f"net{suffix}")
    section = FrozenModel(model=model, architecture=TINY[model], source=str(path))
    make, built = frozen_maker(section, image_size=32), []

    def noting():
        built.append(make())
        return built[0]

    weights = frozen_weights(section, Sources(), where="--teacher.source")
    content, state = path.read_bytes(), torch.random.get_rng_state()
    found = built_from(weights, noting, dtype=torch.bfloat16, where="--teacher.source")
    assert found is built[0]
    assert torch.equal(torch.random.get_rng_state(), state)
    spans, expected = pages_of(path), dict(net.named_parameters())
    for name, parameter in found.net.named_parameters():
        assert torch.equal(parameter, expected[name].bfloat16()), name
        address = parameter.data_ptr()
        is_mapped = any(begin <= address < end for begin, end in spans)
        assert is_mapped == (stored == torch.bfloat16), name
    whole = make()
    whole.net.load_state_dict(net.state_dict())
    assert torch.equal(found(IMAGES).tokens, whole.bfloat16()(IMAGES).tokens)
    # A bit that flips in memory, or a test that flips one, stays out of the file.
    parameter.data.view(-1)[0] = 7.0
    assert path.read_bytes() == content


def test_a_frozen_model_is_built_from_its_weights_alone_only_where_these_are_all(tmp_path):
    net = made("dino_vit_base_patch16")
    section = FrozenModel(
        model="dino_vit_base_patch16",
        architecture=TINY_VIT,
        source=str(saved(net, tmp_path / "net.safetensors")),
    )
    make = frozen_maker(section, image_size=32)
    fill = partial(built_from, dtype=torch.float32, where="--teacher.source")
    state = net.state_dict()
    state["norm.bias"][3] = torch.nan
    saved(net, tmp_path / "nan.safetensors")
    broken = replace(section, source=str(tmp_path / "nan.safetensors"))
    with pytest.raises(WeightsError, match=r"1 of 32 .* norm\.bias"):
        fill(frozen_weights(broken, Sources(), where="--teacher.source"), make)
    del state["norm.bias"]
    torch.save(state, tmp_path / "part.pth")
    part = replace(section, source=str(tmp_path / "part.pth"), allow=("norm.bias",))
    assert fill(frozen_weights(part, Sources(), where="--teacher.source"), make) is None

    def with_scales():
        model = make()
        model.net.register_buffer("scales", model.net.norm.weight.detach() * 2)
        return model

    weights = frozen_weights(section, Sources(), where="--teacher.source")
    assert fill(weights, with_scales) is None

    def tied():
        model = make()
        model.net.same = model.net.norm
        model.net.shares = torch.nn.Linear(1, 1, bias=False)
        model.net.shares.weight = model.net.norm.weight
        return model

    found = fill(weights, tied)
    assert found.net.same.weight is found.net.norm.weight
    assert found.net.shares.weight is found.net.norm.weight
    assert torch.equal(found.net.norm.weight, net.norm.weight)
