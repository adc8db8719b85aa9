"""From the names of a file to those of a model, before a tensor is read."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from fd_large.backbones.hierarchical import PatchMerging
from fd_large.backbones.translation import (
    Piece,
    Target,
    fresh_norm,
    from_unfolded,
    projection,
    replaced,
    to_unfolded,
    translated,
)


def test_a_query_without_its_key_makes_no_tensor():
    def rule(name):
        return Target("qkv", "qkv".index(name)) if name in "qkv" else None

    whole = translated(["q", "v", "x", "k"], rule)
    assert whole.pieces == {"qkv": Piece(("q", "k", "v"))}
    assert whole.dropped == ["x"]
    broken = translated(["q", "v"], rule)
    assert broken.pieces == {}
    assert broken.unfit == ["q", "v"]
    twice = translated(["a", "b"], lambda name: Target("same"))
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
    piece = translated("vqk", lambda n: Target("qkv", "qkv".index(n))).pieces["qkv"]
    assert piece.shape(lambda name: tuple(tensors[name].shape)) == (6, 3)
    assert piece.read(tensors)[:, 0].tolist() == [0, 0, 1, 1, 2, 2]


def test_constants_need_no_file():
    norm = fresh_norm(4)
    assert [norm[f"norm.{kind}"].read({}).tolist() for kind in ("weight", "bias")] == [
        [1.0] * 4,
        [0.0] * 4,
    ]
    assert norm["norm.bias"].shape(None) == (4,)


def test_names_are_replaced_one_pair_after_the_other():
    assert replaced("a.b.c", [(".b.", ".d."), ("d.c", "e")]) == "a.e"
    assert projection("decoder.0.weight") == Target("projection.weight", form="matrix")
