"""`transfer` from end to end on toy datasets in every layout, killed in the middle and finished."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import transfer_toy
from html_page import check_page
from launch import ROOT, run_ranks, start_ranks

PROGRAM = ROOT / "fd_large/__main__.py"


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return transfer_toy.write_toy(tmp_path_factory.mktemp("toy"))


def scores(out: Path) -> dict[tuple[str, str], dict]:
    cells = json.loads((out / "summary.json").read_text())["cells"]
    return {(cell["row"], cell["column"]): cell["scores"] for cell in cells}


def test_a_table_that_is_killed_in_the_middle_is_the_same(toy: Path, tmp_path: Path) -> None:
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    rows = ("--rows", "student", "teacher")
    done = run_ranks(PROGRAM, *transfer_toy.words(toy, calm), *rows, ranks=1, timeout=300)
    found = scores(calm)
    assert len(found) == 2 * len(transfer_toy.COLUMNS)
    assert all(found.values()), done.outputs[0]
    differences = json.loads((calm / "summary.json").read_text())["differences"]
    scored = {one["score"]: one for one in differences}
    assert scored.keys() == {"test_top1", "val_mIoU", "box_AP", "mask_AP", "val_rmse"}
    for one in differences:
        low, high = one["interval_of_images"]
        assert low <= one["mean"] <= high
        assert (one["needs_seeds"], one["is_shown"]) == (True, False), "of one seed"
    page = check_page(calm / "report.html")
    assert "mine less mine: teacher" in page.words

    # The student's row alone, in the middle of its third training.
    words = [*transfer_toy.words(toy, killed), "--rows", "student"]
    third = killed / "mine" / "ade20k" / "seed_0"
    started = start_ranks(PROGRAM, *words, ranks=1)
    try:
        started.until((third / "checkpoints/step_00000001").exists, 200)
    finally:
        started.kill()
    again = run_ranks(PROGRAM, *words, ranks=1, timeout=300)
    assert "2 of them done before" in again.outputs[0]
    assert "resumed after step" in again.outputs[0]
    student = {key: value for key, value in found.items() if key[0] == "mine"}
    assert scores(killed) == student
