"""Kernels compiled for GPUs that are not here: they must fit, and nothing may spill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from aot import usage
from aot_cases import CASES

RECORDED = Path(__file__).parents[3] / "benchmarks" / "results" / "kernels_aot.json"
# Registers of a multiprocessor, and the shared memory that one program can have.
REGISTERS = 65536
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
# The others are compiled by `benchmarks/kernels.py --aot`, which takes minutes.
CHECKED = [
    "residual_norm, 2048 channels, float32 stream",
    "residual_norm, 2048 channels, two rows",
    "bias_gelu, 8192 channels",
    "whitened_loss, 4096 channels, bfloat16",
    "whitened_loss, 768 channels, two rows",
    "window_attention, window 12, shift 6",
    "window_attention, 197 tokens, table",
    # What once spilled, or took more shared memory than an A100 has.
    "residual_norm, 4096 channels, float32 stream, float32 branch",
    "residual_norm, 8192 channels, bfloat16 stream, float32 branch",
    "window_attention, window 14, head width 64, shifted, padded",
    "window_attention, window 14, head width 128, shifted, padded",
]


def assert_fits(row):
    assert row["spill_bytes"] == 0, row
    assert 0 <= row["shared_bytes"] <= SHARED_BYTES[row["capability"]], row
    assert 0 < row["registers"] * row["num_warps"] * 32 <= REGISTERS, row


@pytest.mark.parametrize("name", CHECKED)
def test_kernels_fit_both_generations(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    rows = usage(CASES[name])
    assert {row["capability"] for row in rows} == {80, 90}
    for row in rows:
        assert_fits(row)


def test_every_case_is_on_record_and_fits():
    recorded = json.loads(RECORDED.read_text())["cases"]
    assert recorded.keys() == CASES.keys()
    for rows in recorded.values():
        for row in rows:
            assert_fits(row)
