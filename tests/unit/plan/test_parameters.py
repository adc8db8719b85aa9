"""The hand table of shapes against the built modules, whose counts test_registry.py holds."""

from __future__ import annotations

import math

import pytest

from fd_large.errors import ConfigError
from fd_large.plan.parameters import count, projection_shapes, shapes, sizes, width
from fd_large.recipes.architectures import ARCHITECTURES, Architecture, resolve

TABLED = [name for name, model in ARCHITECTURES.items() if hasattr(model, "depths")]


@pytest.mark.parametrize("name", TABLED)
def test_a_built_model_has_these_tensors(name):
    pytest.importorskip("torch")
    from fd_large.backbones.registry import parameter_shapes

    model = resolve(name)
    assert parameter_shapes(model) == shapes(model)
    if model.resizes_positions:
        smaller = 4 * model.patch_size
        assert parameter_shapes(model.at(smaller)) == shapes(model, image_size=smaller)


@pytest.mark.parametrize(
    "given",
    [
        {"shared_position_bias": True},
        {"extra_norm_every": 2, "qkv_bias": "none"},
        {"absolute_position": True, "patch_norm": False},
    ],
)
def test_options_of_swinv2_are_in_the_table(given):
    pytest.importorskip("torch")
    from fd_large.backbones.registry import parameter_shapes

    model = resolve("swinv2_tiny", Architecture(**given))
    assert parameter_shapes(model) == shapes(model)


@pytest.mark.parametrize("name", [name for name in TABLED if name.startswith("swinv2")])
def test_swinv2_counts_follow_the_closed_formula(name):
    model = resolve(name, Architecture(extra_norm_every=0))
    total = 51 * model.embed_dim + 16 * model.embed_dim
    for stage, (depth, heads) in enumerate(zip(model.depths, model.num_heads, strict=True)):
        c = model.embed_dim * 2**stage
        total += depth * (12 * c**2 + 12 * c + 1536 + 513 * heads)
        total += (8 * c**2 + 4 * c) if stage < 3 else 0
    assert count(shapes(model)) == total


@pytest.mark.parametrize(
    ("name", "tensors", "elements"),
    [  # Both optimizer groups of the official code together, with the projection.
        ("vit_base_patch16", 51 + 137, 86_123_088 + 132_864),
        ("swinv2_base", 101 + 324, 87_562_240 + 381_176),
        ("swinv2_giant", 205 + 676, 3_011_534_848 + 3_090_144),
    ],
)
def test_tensors_are_as_many_as_the_optimizer_groups_hold(name, tensors, elements):
    model = resolve(name)
    projection = projection_shapes(width(model), width(model))
    assert projection == {"weight": (width(model), width(model)), "bias": (width(model),)}
    table = sizes([shapes(model), projection])
    assert (len(table), sum(table)) == (tensors, elements)
    assert sum(map(math.prod, shapes(model).values())) == count(shapes(model))


def test_models_of_timm_are_counted_whole_or_refused():
    assert width(resolve("efficientnet_lite0")) == 40
    with pytest.raises(ConfigError, match="tf_efficientnet_lite0"):
        shapes(resolve("efficientnet_lite0"))
    with pytest.raises(ConfigError, match="convnext_tiny"):
        width(resolve("timm", Architecture(timm_name="convnext_tiny")))
