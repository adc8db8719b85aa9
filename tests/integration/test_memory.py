"""Building never holds more than a share and a module; a long run's memory stays flat."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import read_results, run_ranks
from pictures import write_pictures

PROGRAMS = Path(__file__).parent / "programs"


def test_building_holds_a_share_and_one_module(tmp_path: Path) -> None:
    run_ranks(PROGRAMS / "building.py", tmp_path, ranks=2, results=tmp_path)
    for result in read_results(tmp_path, 2):
        assert result["modules"] > 100
        # Parents add to the module at hand the children's few bytes that are still their own.
        assert result["most_whole"] <= 1.01 * result["largest_module"]
        assert result["largest_module"] < 0.1 * result["all"]
        assert result["held"] == pytest.approx(result["all"] / 2, rel=0.001)


@pytest.mark.parametrize("updates", [200, pytest.param(1000, marks=pytest.mark.sweep)])
def test_many_updates_leave_memory_flat(updates: int, tmp_path: Path) -> None:
    # Ten epochs: ten loaders come and go.
    pictures = write_pictures(tmp_path / "pictures", 4 * updates // 10, size=24)
    run_ranks(
        *(PROGRAMS / "many_steps.py", updates, pictures, tmp_path),
        ranks=2,
        timeout=400,
        results=tmp_path,
    )
    for rows in read_results(tmp_path, 2):
        assert len(rows) == 10
        assert all(row["rate"] > 0 for row in rows)
        # An image more or less may wait in the loader; a step that leaks adds one each.
        tensors = [row["tensors"] for row in rows[1:]]
        assert max(tensors) - min(tensors) < 64 << 10
        growth = rows[-1]["resident"] - rows[2]["resident"]
        assert growth < 8 << 20, "pages of the allocator may come and go"
