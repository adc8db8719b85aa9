"""Heads by name: built-in ones, a user's own, and what is refused on shapes alone."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fd_large import doors
from fd_large.engine.heads import check_head, make_head
from fd_large.errors import ConfigError

OWN = """
from torch import nn

def mlp(width, out_width):
    return nn.Sequential(nn.Linear(width, 20), nn.GELU(), nn.Linear(20, out_width))

def wrong(width, out_width):
    return nn.Linear(width, 3)

def nothing(width, out_width):
    return None

def broken(width, out_width, depth):
    return nn.Linear(width, out_width)

def drops(width, out_width):
    return nn.Sequential(nn.Linear(width, out_width), nn.Dropout(0.1))

def still(width, out_width):
    return nn.Sequential(nn.Linear(width, out_width), nn.Dropout(0.0))

def batches(width, out_width):
    return nn.Sequential(nn.Linear(width, out_width), nn.BatchNorm1d(out_width))

class Noisy(nn.Linear):
    def forward(self, x):
        return super().forward(nn.functional.dropout(x, 0.1))

class Raises(nn.Linear):
    def forward(self, x):
        return super().forward(x) + x[99]

def raises(width, out_width):
    raise KeyError("no width")
"""
WHERE = "objective.head"


@pytest.fixture
def make(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    doors.allow(tmp_path / "own.py")

    def make(name):
        source = name if name == "linear" else f"module:{tmp_path}/own.py:{name}"
        return make_head(source, 8, 12, built_in={"linear": nn.Linear}, where=WHERE)

    return make


def test_a_head_is_built_in_or_the_users_own(make):
    assert type(make("linear")) is nn.Linear
    assert make("mlp")(torch.zeros(2, 3, 8)).shape == (2, 3, 12)


def test_a_head_is_checked_on_the_meta_device(make):
    with torch.device("meta"):
        for name in ("linear", "mlp", "still"):
            check_head(make(name), name, (2, 3, 8), 12, where=WHERE)
        with pytest.raises(ConfigError, match=r"objective\.head.*\(2, 3, 3\)"):
            check_head(make("wrong"), "wrong", (2, 3, 8), 12, where=WHERE)
        with pytest.raises(ConfigError, match=r"objective\.head.*bernoulli"):
            check_head(make("Noisy"), "Noisy", (2, 3, 8), 12, where=WHERE)
        with pytest.raises(ConfigError, match=r"objective\.head.*own\.py line \d+"):
            check_head(make("Raises"), "Raises", (2, 3, 8), 12, where=WHERE)


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("nothing", "NoneType"),
        ("broken", "depth"),
        ("mlpp", "nearest: mlp"),
        ("raises", "own.py line"),
        ("drops", "Dropout '1'"),
        ("batches", "BatchNorm1d '1'"),
    ],
)
def test_what_is_no_head_is_refused(make, name, part):
    with pytest.raises(ConfigError, match=r"objective\.head") as caught:
        make(name)
    assert part in str(caught.value)
