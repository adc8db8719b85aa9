"""A file covers a model, or is refused before anything is read, each difference by name."""

from __future__ import annotations

import math

import pytest
import torch

from fd_large.backbones.translation import Piece
from fd_large.errors import WeightsError
from fd_large.weights.coverage import Fitted, can_resize, covered, match, resized
from fd_large.weights.read import Tensors


def test_the_report_names_everything_that_does_not_fit():
    expected = {"a": (2,), "b": (3,), "c": (1, 2)}
    items = [("b", torch.zeros(4)), ("c", torch.zeros(1, 2)), ("d", torch.zeros(1))]
    with pytest.raises(WeightsError) as caught:
        dict(covered(expected, [*items, ("c", torch.zeros(1, 2))], where="test"))
    message = str(caught.value)
    for piece in ("missing: a", "left over: d", "b (4,) for (3,)", "given twice: c"):
        assert piece in message
    allowed = frozenset({"a"})
    good = [("b", torch.zeros(3)), ("c", torch.zeros(1, 2))]
    assert dict(covered(expected, good, where="test", may_be_missing=allowed)).keys() == {"b", "c"}


SHAPES = {"a": (2, 3), "b.pos_embed": (1, 5, 4), "b.relative_position_bias_table": (49, 2)}


def test_what_fits_is_known_from_shapes_alone():
    shapes = {"a": (2, 3), "b.pos_embed": (1, 10, 4), "b.relative_position_bias_table": (9, 2)}
    found = match(shapes, SHAPES)
    assert found.matched == list(SHAPES)
    assert found.to_resize == ["b.pos_embed", "b.relative_position_bias_table"]
    assert (found.parameters, found.total) == (124, 124)
    assert not found.complaints
    fixed = match(shapes, SHAPES, resize=False)
    assert [text.split()[0] for text in fixed.misfits] == found.to_resize
    assert fixed.parameters == 6


@pytest.mark.parametrize(
    ("name", "old", "new", "fits"),
    [
        ("pos_embed", (1, 5, 4), (1, 10, 4), True),
        ("pos_embed", (1, 5, 4), (1, 10, 8), False),
        ("x.absolute_pos_embed", (1, 4, 4), (1, 9, 4), True),
        ("pos_embed.weight", (1, 5, 4), (1, 10, 4), False),
        ("relative_position_bias_table", (49, 2), (9, 2), True),
        ("relative_position_bias_table", (49, 2), (9, 3), False),
        ("weight", (49, 2), (9, 2), False),
    ],
)
def test_tables_of_positions_alone_are_resized(name, old, new, fits):
    assert can_resize(name, old, new) == fits


def test_differences_are_allowed_by_name():
    shapes = {"a": (2, 3), "head.weight": (7,), "head.bias": (7,), "other": (1,)}
    found = match(shapes, {"a": (2, 3), "norm.weight": (4,)}, allow=("head.*", "norm.weigh?"))
    assert found.left_over == ["other"]
    assert found.missing == []
    assert sorted(found.allowed) == ["head.bias", "head.weight", "norm.weight"]
    assert found.summary().startswith("60% of the model's 10 numbers, 1 tensors")


def test_almost_all_is_not_all():
    found = match({"a": (999_999,)}, {"a": (999_999,), "b": (1,)})
    assert found.summary().startswith("99.99% ")


def fitted(tensors, expected, **options):
    pieces = {name: Piece((name,)) for name in tensors}
    return Fitted(pieces, Tensors(tensors), expected, label="a file", **options)


def test_tensors_are_read_as_they_are_asked_for_and_no_nan_passes():
    bad = torch.ones(2, 3)
    bad[1, 2] = math.nan
    items = iter(fitted({"a": torch.ones(2), "b": bad}, {"a": (2,), "b": (2, 3)}))
    assert next(items)[0] == "a"
    with pytest.raises(WeightsError, match=r"1 of 6 .* in b"):
        next(items)


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.bool, torch.complex64])
def test_quantised_weights_are_refused_before_they_are_read(dtype):
    with pytest.raises(WeightsError, match=rf"got a in {str(dtype)[6:]}"):
        fitted({"a": torch.ones(2, dtype=dtype)}, {"a": (2,)})


def test_a_name_that_may_be_missing_keeps_its_first_value():
    found = fitted({"a": torch.ones(2)}, {"a": (2,), "b": (3,)}, allow=("b",))
    assert dict(found).keys() == {"a"}
    assert found.may_be_missing == {"b"}
    with pytest.raises(WeightsError, match=r"missing: b"):
        fitted({"a": torch.ones(2)}, {"a": (2,), "b": (3,)}, remedy="Try so.")


@pytest.mark.parametrize("prefix", ["cls_token", "dist_token"])
def test_tables_keep_what_belongs_to_class_tokens(prefix):
    expected = {prefix: (1, 1, 4), "pos_embed": (1, 17, 4)}
    table = torch.randn(1, 5, 4)
    new = resized("pos_embed", table, (1, 17, 4), expected)
    assert new.shape == (1, 17, 4)
    assert torch.equal(new[:, 0], table[:, 0])
    # A constant stays one, whatever the grid.
    flat = resized("pos_embed", torch.ones(1, 5, 4), (1, 17, 4), expected)
    torch.testing.assert_close(flat, torch.ones(1, 17, 4))


@pytest.mark.parametrize("extra", [0, 3])
def test_tables_of_biases_keep_the_rows_of_class_tokens(extra):
    expected = {"cls_token": (1, 1, 4)} if extra else {}
    table = torch.randn(9 + extra, 2)
    new = resized("relative_position_bias_table", table, (25 + extra, 2), expected)
    assert new.shape == (25 + extra, 2)
    assert torch.equal(new[25:], table[9:])
