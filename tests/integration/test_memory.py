"""Building never holds more than a share and a module; a long run's memory stays flat."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import read_results, run_ranks

PROGRAMS = Path(__file__).parent / "programs"
pytestmark = [pytest.mark.multirank, pytest.mark.slow]


def test_building_holds_a_share_and_one_module(tmp_path: Path) -> None:
    run_ranks(PROGRAMS / "building.py", tmp_path, ranks=2, results=tmp_path)
    for result in read_results(tmp_path, 2):
        assert result["modules"] > 100
        # Parents add to the module at hand the children's few bytes that are still their own.
        assert result["most_whole"] <= 1.01 * result["largest_module"]
        assert result["largest_module"] < 0.1 * result["all"]
        assert result["held"] == pytest.approx(result["all"] / 2, rel=0.001)


def test_a_thousand_updates_leave_memory_flat(tmp_path: Path) -> None:
    run_ranks(PROGRAMS / "thousand_steps.py", tmp_path, ranks=2, timeout=300, results=tmp_path)
    for result in read_results(tmp_path, 2):
        rows = result["rows"]
        assert len(rows) == 10
        assert {row["tensors"] for row in rows[1:]} == {rows[1]["tensors"]}, "not one tensor more"
        growth = rows[-1]["resident"] - rows[2]["resident"]
        assert growth < 8 << 20, "pages of the allocator may come and go"
