"""From the names of a file to those of a model, before a tensor is read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fd_large.backbones.hierarchical import PatchMerging
from fd_large.backbones.translation import (
    FEATURE_DISTILLATION,
    Piece,
    fresh_norm,
    from_unfolded,
    our_name,
    outputs,
    table,
    to_unfolded,
    translated,
)

FUSED = table("""
q   qkv     q
k   qkv     k
v   qkv     v
x   -
""")


def test_a_query_without_its_key_makes_no_tensor():
    whole = translated(["q", "v", "x", "k"], FUSED)
    assert whole.pieces == {"qkv": Piece(("q", "k", "v"))}
    assert whole.dropped == ["x"]
    broken = translated(["q", "v"], FUSED)
    assert broken.pieces == {}
    assert broken.unfit == ["q", "v"]
    twice = translated(["a", "b"], table("{a|b} same"))
    assert twice.unfit == ["b"]


def test_merging_in_the_order_of_unfold_is_the_same_function():
    merging, x = PatchMerging(), torch.randn(1, 4, 6, 3, dtype=torch.float64)
    weight = torch.randn(5, 12, dtype=torch.float64)
    unfolded = F.unfold(x.permute(0, 3, 1, 2), kernel_size=2, stride=2).transpose(1, 2)
    got = unfolded @ to_unfolded(weight).T
    torch.testing.assert_close(got, merging(x).flatten(1, 2) @ weight.T)
    assert torch.equal(from_unfolded(to_unfolded(weight)), weight)
    file = {"norm": to_unfolded(weight[0])}
    assert torch.equal(Piece(("norm",), "unfolded").read(file), weight[0])


@pytest.mark.parametrize(
    ("form", "shape", "expected"),
    [
        ("", (4, 3, 1, 1), (4, 3, 1, 1)),
        ("token", (6,), (1, 1, 6)),
        ("token", (1, 6), (1, 1, 6)),
        ("batched", (5, 6), (1, 5, 6)),
        ("batched", (1, 5, 6), (1, 5, 6)),
        ("matrix", (4, 3, 1), (4, 3)),
        ("matrix", (4, 3, 1, 1), (4, 3)),
        ("matrix", (4,), (4,)),
    ],
)
def test_shapes_are_known_before_reading_and_are_those_that_are_read(form, shape, expected):
    tensor = torch.randn(shape)
    piece = Piece(("a",), form)
    assert piece.shape({"a": shape}.get) == expected
    found = piece.read({"a": tensor})
    assert found.shape == expected
    assert torch.equal(found.flatten(), tensor.flatten())


def test_query_key_and_value_are_joined_in_their_order():
    tensors = {name: torch.full((2, 3), float(i)) for i, name in enumerate("qkv")}
    piece = translated("vqk", FUSED).pieces["qkv"]
    assert piece.shape(lambda name: tuple(tensors[name].shape)) == (6, 3)
    assert piece.read(tensors)[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_constants_need_no_file():
    norm = fresh_norm(4)
    assert [norm[f"norm.{kind}"].read({}).tolist() for kind in ("weight", "bias")] == [
        [1.0] * 4,
        [0.0] * 4,
    ]
    assert norm["norm.bias"].shape(None) == (4,)


QUERY_KEY_VALUE = ("query", "key", "value")
BLOCKS = table(
    """
layer.#.                blocks.#.
    norm#.*             norm#.*
    {query|q_proj}.*    qkv.*       q
    {key|k_proj}.*      qkv.*       k
    {value|v_proj}.*    qkv.*       v
    pooled.*            -
    *                   *
""",
    start="{|vit.}",
)


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("layer.11.norm2.weight", ("blocks.11.norm2.weight", "")),
        ("vit.layer.0.k_proj.bias", ("blocks.0.qkv.bias", "k")),
        ("vit.layer.0.mlp.fc1.bias", ("blocks.0.mlp.fc1.bias", "")),
        ("layer.0.pooled.weight", ("-", "")),
        ("layer.a.norm1.weight", ("layer.a.norm1.weight", "")),
        ("xlayer.0.norm1.weight", ("xlayer.0.norm1.weight", "")),
    ],
)
def test_a_row_moves_its_numbers_and_the_rest_of_a_name(theirs, ours):
    assert our_name(theirs, BLOCKS) == ours


def test_the_first_row_that_has_a_name_decides():
    rows = table("a.b -") + table("a.* c.*")
    assert our_name("a.b", rows) == ("-", "")
    assert our_name("a.d", rows) == ("c.d", "")


def test_a_number_may_be_larger_by_one_in_the_file():
    rows = table("layers.+.merge.* layers.#.merge.*")
    assert our_name("layers.10.merge.norm", rows) == ("layers.9.merge.norm", "")
    assert our_name("layers.0.merge.norm", rows) == ("layers.0.merge.norm", "")
    (output,) = outputs("layers.9.merge.norm", (2,), rows)
    assert output.name == "layers.10.merge.norm"


def test_an_export_writes_the_first_of_several_names_and_splits_what_is_joined():
    fused = torch.arange(18.0).reshape(6, 3)
    made = outputs("blocks.2.qkv.weight", (6, 3), BLOCKS)
    assert [output.name for output in made] == [f"layer.2.{n}.weight" for n in QUERY_KEY_VALUE]
    assert torch.equal(torch.cat([output.take(fused) for output in made]), fused)
    assert {output.shape for output in made} == {(2, 3)}


def test_a_tensor_without_a_place_is_not_written():
    assert outputs("norm.weight", (3,), table("- norm.*")) == []


@pytest.mark.parametrize(
    ("form", "shape"),
    [("token", (1, 1, 8)), ("batched", (1, 5, 8)), ("matrix", (4, 8)), ("unfolded", (2, 8))],
)
def test_what_is_written_is_read_to_the_bit(form, shape):
    rows, ours = table(f"a b {form}"), torch.randn(shape)
    (output,) = outputs("b", shape, rows)
    theirs = output.take(ours)
    assert (output.name, output.shape) == ("a", tuple(theirs.shape))
    again = translated(["a"], rows).pieces["b"].read({"a": theirs})
    assert torch.equal(again, ours)


def test_a_projection_is_a_convolution_of_side_one_in_a_students_file():
    made = outputs("projection.weight", (6, 4), FEATURE_DISTILLATION)
    assert [(output.name, output.shape) for output in made] == [("decoder.0.weight", (6, 4, 1))]
