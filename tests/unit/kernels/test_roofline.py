"""Which operations benchmarks/roofline.py lets count as fused."""

from __future__ import annotations

import copy
import importlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from fd_large.plan.rates import CARDS
from fd_large.recipes import registry

ROOT = Path(__file__).parents[3]
RECORDED = json.loads((ROOT / "benchmarks/results/kernels_aot.json").read_text())["cases"]
CASE = {
    "window": (12, 12),
    "prefix": 0,
    "head_width": 32,
    "table": True,
    "shifted_product": False,
    "empty": False,
    "qkv": torch.bfloat16,
    "bias": torch.bfloat16,
}
NORM = {"width": 2048, "empty": False, "stream": torch.float32, "branch": torch.bfloat16}


@pytest.fixture
def roofline(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return importlib.import_module("roofline")


@pytest.mark.parametrize(
    ("op", "case", "change", "expected"),
    [
        ("window_attention", CASE, {}, True),
        ("window_attention", CASE, {"window": (14, 14)}, True),
        # Neither recorded nor compared.
        ("window_attention", CASE, {"window": (10, 10)}, False),
        # Compared, and not compiled ahead.
        ("window_attention", CASE, {"window": (4, 4)}, False),
        # Compiled ahead, and not compared.
        ("window_attention", CASE, {"window": (48, 48)}, False),
        ("window_attention", CASE, {"head_width": 40}, False),
        ("window_attention", CASE, {"bias": torch.float32}, False),
        ("window_attention", CASE, {"table": False}, False),
        ("residual_norm", NORM, {}, True),
        ("residual_norm", NORM, {"width": 2056}, False),
        ("residual_norm", NORM, {"weight": torch.float16}, False),
    ],
)
def test_what_is_proven(op, case, change, expected, roofline):
    assert roofline.proof(RECORDED)(op, case | change) == expected


@pytest.mark.parametrize(
    "change",
    [{"spill_bytes": 8}, {"shared_bytes": 164 * 1024}, {"kernel": "another"}],
)
def test_one_bad_kernel_of_one_generation_is_enough(change, roofline):
    recorded = copy.deepcopy(RECORDED)
    for rows in recorded.values():
        for row in rows:
            window = row["constants"].get("WH") == 12
            if window and row["kernel"] == "_backward" and row["capability"] == 80:
                row.update(change)
    proven = roofline.proof(recorded)
    assert not proven("window_attention", CASE)
    assert proven("window_attention", CASE | {"window": (14, 14)})


def test_what_is_not_proven_counts_as_the_reference_and_is_named(roofline):
    run = registry.get("fd_swinv2_base")
    student, teacher = (
        replace(part, architecture=replace(part.architecture, depths=(1, 1), num_heads=(4, 8)))
        for part in (run.student, run.teacher)
    )
    run = replace(run, student=student, teacher=teacher)

    def operations(proven):
        with roofline.only(proven) as refused:
            rows = roofline.count(run, 2, CARDS["h100"], kernels="triton")
        return {row.op for row in rows}, refused

    every, refused = operations(lambda op, case: True)
    assert {"window_attention", "residual_norm"} <= every
    assert not refused
    some, refused = operations(lambda op, case: op != "window_attention")
    assert not any("attention" in op for op in some)
    assert "residual_norm" in some
    assert all(name.startswith("window_attention (") for name in refused)
    assert refused
    again, _ = operations(lambda op, case: True)
    assert "window_attention" in again
