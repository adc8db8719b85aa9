"""Which kernels benchmarks/kernels.py --blocks wants deleted."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


@pytest.fixture
def kernels(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("kernels")


def rows_of(block, times):
    return [
        {"block": block, "way": way, "failed": taken}
        if isinstance(taken, str)
        else {"block": block, "way": way, "microseconds": taken}
        for way, taken in times.items()
    ]


def test_a_kernel_goes_if_no_block_is_much_slower_without_it(kernels):
    with_it = {"ours": 110.0, "ours in a compiled block": 100.0}
    first = {
        "without residual_norm": 108.0,
        "without residual_norm, in a compiled block": 102.0,
        "without window_attention": "RuntimeError: no",
        "without window_attention, in a compiled block": 130.0,
    }
    found = kernels.verdicts(rows_of("a", with_it | first))
    assert found["residual_norm"] == {"ratios": {"a": pytest.approx(1.02)}, "delete": True}
    assert found["window_attention"] == {"ratios": {"a": pytest.approx(1.3)}, "delete": False}
    assert found["add_norm"] == {"ratios": {}, "delete": False}
    slower = with_it | {"without residual_norm": 104.0}
    found = kernels.verdicts(rows_of("a", with_it | first) + rows_of("b", slower))
    assert not found["residual_norm"]["delete"]
