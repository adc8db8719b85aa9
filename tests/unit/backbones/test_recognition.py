"""Facts of an architecture from names and shapes alone."""

from __future__ import annotations

import pytest

from fd_large.backbones import recognition
from fd_large.errors import WeightsError
from fd_large.recipes.architectures import Architecture


def test_blocks_are_counted_by_their_largest_number():
    shapes = dict.fromkeys(("blocks.0.a", "blocks.11.a", "blocks.2.b", "xblocks.40.a"), (1,))
    assert recognition.count_of(shapes, r"blocks\.(\d+)\.") == 12
    assert recognition.count_of(shapes, r"layers\.(\d+)\.") == 0


def test_widths_give_the_ratio():
    assert recognition.mlp_ratio({"fc1.weight": (64, 16)}, "fc1.weight", 16) == 4.0
    assert recognition.mlp_ratio({}, "fc1.weight", 16) is None


@pytest.mark.parametrize(
    ("names", "bias"),
    [
        (["qkv.weight", "qkv.bias"], "fused"),
        (["qkv.weight", "q_bias", "v_bias"], "qv"),
        (["qkv.weight", "q_bias", "k_bias", "v_bias"], "qkv"),
        (["qkv.weight"], "none"),
    ],
)
def test_which_of_query_key_and_value_have_a_bias(names, bias):
    assert recognition.qkv_bias({f"attn.{name}": (1,) for name in names}, "attn.") == bias


@pytest.mark.parametrize(("cells", "side"), [(196, 14), (1, 1), (0, 0), (195, 0), (-1, 0)])
def test_the_side_of_a_square(cells, side):
    assert recognition.side_of(cells) == side


@pytest.mark.parametrize(("offsets", "side"), [(169, 7), (1, 1), (49, 4), (16, 0), (170, 0)])
def test_the_side_of_a_window_from_its_offsets(offsets, side):
    assert recognition.grid_of(offsets) == side


def test_an_image_size_where_no_shape_tells_it():
    known = Architecture(patch_size=4, depths=(2, 2, 6, 2))
    assert recognition.size_to_compare(known) == {"image_size": 64}
    assert recognition.size_to_compare(Architecture(depths=(2,))) == {}
    assert recognition.size_to_compare(Architecture(patch_size=4, absolute_position=True)) == {}


def test_activations_of_other_libraries():
    names = {"gelu": "gelu", "GELU": "gelu", "quick_gelu": "quick_gelu", "QuickGELU": "quick_gelu"}
    for theirs, ours in names.items():
        assert recognition.activation_named(theirs, "w", of="act") == ours
    assert recognition.activation_named(None, "w", of="act") is None
    with pytest.raises(WeightsError, match=r"^w: .*act 'relu'"):
        recognition.activation_named("relu", "w", of="act")
