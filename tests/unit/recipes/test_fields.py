"""Fields of dataclasses: their types, their checks, and the way to JSON and back."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field, replace
from types import UnionType
from typing import Any, Literal, Union, get_args, get_origin

import pytest

from fd_large.errors import ConfigError
from fd_large.recipes import registry
from fd_large.recipes.fields import (
    at_least,
    check_types,
    describe_type,
    field_names,
    fits,
    flat,
    from_plain,
    nested,
    not_negative,
    override,
    plain,
    positive,
    within,
)
from fd_large.recipes.run import Run, Task


@dataclass(frozen=True, kw_only=True)
class Inner:
    depths: tuple[int, ...] = (1, 2)
    rate: float | None = None

    def __post_init__(self) -> None:
        check_types(self, "inner")


@dataclass(frozen=True, kw_only=True)
class Outer:
    name: str
    inner: Inner = field(default_factory=Inner)
    several: dict[str, Inner] = field(default_factory=dict)


@pytest.mark.parametrize(
    ("value", "hint", "fit"),
    [
        (1, int, True),
        (True, int, False),
        (1.0, int, False),
        (1, float, True),
        (True, float, False),
        ("1", float, False),
        (None, int | None, True),
        (0, int | None, True),
        ("a", Literal["a", "b"], True),
        ("c", Literal["a", "b"], False),
        (True, Literal[1, 2], False),
        ((1, 2), tuple[int, ...], True),
        ((), tuple[int, ...], True),
        ([1, 2], tuple[int, ...], False),
        ((1.5, 2), tuple[float, float], True),
        ((1.5,), tuple[float, float], False),
        ({"a": 1}, dict[str, int], True),
        ({"a": "b"}, dict[str, int], False),
        (object(), Any, True),
    ],
)
def test_a_value_is_of_a_type_or_not(value, hint, fit):
    assert fits(value, hint) == fit


@pytest.mark.parametrize(
    ("hint", "words"),
    [
        (int, "a whole number"),
        (float | None, "a number or None"),
        (Literal["a", "b"], "one of a, b"),
        (Literal["a"] | int, "a or a whole number"),
        (tuple[str, ...], "text"),
        (tuple[float, float, float], "3 numbers"),
        (bool, "True or False"),
        (Inner, "a section Inner"),
    ],
)
def test_a_type_in_words(hint, words):
    assert describe_type(hint) == words


@pytest.mark.parametrize(
    ("check", "good", "bad"),
    [
        (positive, [1e-9, 3], [0, -1.0, math.inf, math.nan]),
        (not_negative, [0, 0.5], [-1e-9, math.inf, math.nan]),
        (lambda where, value: at_least(where, value, 2, "steps"), [2, 9], [1, -2]),
    ],
)
def test_limits_name_field_and_value(check, good, bad):
    for value in good:
        check("optim.x", value)
    for value in bad:
        with pytest.raises(ConfigError, match=rf"^optim\.x: .*got {value}, .*--optim\.x"):
            check("optim.x", value)


OUTER = Outer(name="n", inner=Inner(depths=(3,), rate=0.5), several={"a": Inner()})


def test_json_and_back():
    tree = plain({"name": "n", "inner": {"depths": (3,), "rate": 0.5}})
    assert tree["inner"]["depths"] == [3]
    tree["several"] = {"a": {}}
    assert from_plain(Outer, tree, "") == OUTER
    assert flat(OUTER) == {
        "name": "n",
        "inner.depths": (3,),
        "inner.rate": 0.5,
        "several.a.depths": (1, 2),
        "several.a.rate": None,
    }
    assert nested({"a.b": 1, "a.c": 2, "d": 3}) == {"a": {"b": 1, "c": 2}, "d": 3}


def test_an_override_leaves_the_rest_and_the_original():
    changed = override(OUTER, {"inner.rate": None, "several.a.depths": (7,)})
    assert changed == replace(OUTER, inner=Inner(depths=(3,)), several={"a": Inner(depths=(7,))})
    assert OUTER.inner.rate == 0.5


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"name": "n", "innr": {}}, "innr: .*nearest: inner"),
        ({"name": "n", "inner": {"rte": 1}}, r"inner\.rte: .*nearest: inner\.rate"),
        ({"name": "n", "inner": {"depths": "x"}}, r"inner\.depths: .*got 'x', .*whole num"),
        ({"name": "n", "inner": {"depths": [1.5]}}, r"inner\.depths: "),
        ({"name": "n", "inner": 3}, "^inner: .*got 3"),
        ({"name": "n", "several": {"a": {"rte": 1}}}, r"several\.a\.rte: .*rate"),
        ({"inner": {}}, "^recipe: incomplete; .*'name'"),
        ([], "^recipe: not a section"),
    ],
)
def test_what_does_not_belong_is_named(values, message):
    with pytest.raises(ConfigError, match=message):
        from_plain(Outer, values, "")


def test_named_sections_have_the_names_that_the_user_wrote():
    assert "several.NAME.rate" in field_names(Outer)
    assert "several.clip.rate" in field_names(Outer, like="several.clip.rte")


def test_field_names_flatten_nested_sections():
    names = field_names(Run)
    assert {"name", "optim.base_lr", "teacher.architecture.depths"} <= set(names)
    assert "teacher.architecture" not in names
    assert names["optim.betas"] == tuple[float, float]
    assert describe_type(names["batch.micro_batch_size"]) == "a whole number or auto"
    assert describe_type(names["student.architecture.depths"]) == "whole numbers or None"
    assert describe_type(names["optim.betas"]) == "2 numbers"


def _unusable(hint):
    """Values of a numeric type that no run can use, in the form of the type."""
    if get_origin(hint) in (Union, UnionType):
        return [value for part in get_args(hint) for value in _unusable(part)]
    if get_origin(hint) is tuple:
        parts = [part for part in get_args(hint) if part is not Ellipsis]
        return [(value,) * len(parts) for value in _unusable(parts[0])]
    whole = [10**24, -(10**24)]
    return {int: whole, float: [math.inf, -math.inf, math.nan, 1e24, *whole]}.get(hint, [])


def test_no_numeric_field_takes_a_number_that_no_run_can_use():
    several = {"teachers.a.source": "a", "students.b.base_lr": 1.0}
    run = registry.get("fd_swinv2g").with_fields(several)
    tried: set[str] = set()
    for name in flat(run):
        own = name.partition("architecture.")[2] or name  # All models have the same fields.
        hint = (field_names(Run, like=name) | field_names(Task, "task.", like=name))[name]
        for value in _unusable(hint) if own not in tried else ():
            with pytest.raises(ConfigError, match=rf"^{re.escape(name)}: "):
                run.with_fields({name: value})
        tried |= {own} if _unusable(hint) else set()
    assert len(tried) > 80


@pytest.mark.parametrize(
    ("interval", "inside", "outside"),
    [
        ("[0, 1)", (0, 0.5), (1, -0.1, math.nan)),
        ("(0, 1]", (1, 0.5), (0, 1.1, math.inf)),
        ("[0, 10]", (0, 10), (-1, 11)),
    ],
)
def test_an_interval_holds_the_ends_that_its_brackets_say(interval, inside, outside):
    for value in inside:
        within("data.x", value, interval)
    for value in outside:
        with pytest.raises(ConfigError, match=rf"^data\.x: .*got {value}, .*{re.escape(interval)}"):
            within("data.x", value, interval)
