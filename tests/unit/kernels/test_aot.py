"""Kernels compiled for GPUs that are not here: they must fit, and nothing may spill."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

pytest.importorskip("triton")

from aot import digest, usage
from aot_cases import CASES

RECORDED = Path(__file__).parents[3] / "benchmarks" / "results" / "kernels_aot.json"
# Registers of a multiprocessor, and the shared memory that one program can have.
REGISTERS = 65536
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}
OPERATIONS = sorted({name.split(",")[0] for name in CASES})


@pytest.fixture
def recorded():
    return json.loads(RECORDED.read_text())


def assert_fits(row):
    assert row["spill_bytes"] == 0, row
    assert 0 <= row["shared_bytes"] <= SHARED_BYTES[row["capability"]], row
    assert 0 < row["registers"] * row["num_warps"] * 32 <= REGISTERS, row


@pytest.mark.parametrize(
    "everything", [False, pytest.param(True, marks=pytest.mark.sweep)], ids=["changed", "all"]
)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_kernels_fit_both_generations(operation, everything, recorded, tmp_path, monkeypatch):
    """Compiles what is not as it was when `benchmarks/kernels.py --aot` last wrote it down."""
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    for name in [name for name in CASES if name.split(",")[0] == operation]:
        if everything or digest(CASES[name]) != recorded["digests"].get(name):
            rows = usage(CASES[name])
            assert {row["capability"] for row in rows} == {80, 90}
            for row in rows:
                assert_fits(row)


def test_every_case_is_on_record_and_fits(recorded):
    assert recorded["cases"].keys() == CASES.keys()
    for rows in recorded["cases"].values():
        for row in rows:
            assert_fits(row)
