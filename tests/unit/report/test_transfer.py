"""The table of `transfer`, made from folders of runs: figures, differences, gaps, the paper's."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from html_page import check_page
from PIL import Image

from fd_large.errors import ConfigError
from fd_large.recipes.file_names import SUMMARY
from fd_large.report.transfer import write_table

ROWS = ("student", "teacher", "scratch")
SCORES = {
    "finetune": [{"key": "top1", "title": "top-1 %", "scale": 1.0, "digits": 1}],
    "depth": [{"key": "rmse", "title": "RMSE", "scale": 1.0, "digits": 3}],
    "coco": [
        {"key": "AP", "title": "box AP", "scale": 100.0, "digits": 1},
        {"key": "mask_AP", "title": "mask AP", "scale": 100.0, "digits": 1},
    ],
}
VALUES = {
    ("student", "finetune"): [85.0, 85.2],
    ("teacher", "finetune"): [83.0, 82.8],
    ("student", "depth"): [0.352],
    ("teacher", "depth"): [0.416],
}


@pytest.fixture
def table(tmp_path: Path) -> Path:
    """Two seeds of one column, one of another, a third without a run."""
    cells = []
    for (row, column), values in VALUES.items():
        for seed, value in enumerate(values):
            run = tmp_path / row / column / f"seed_{seed}"
            run.mkdir(parents=True)
            key = SCORES[column][0]["key"]
            (run / "summary.json").write_text(json.dumps({"status": "done", key: value}))
            cells.append({"row": row, "column": column, "seed": seed, "run": str(run)})
    # One that goes, one that failed, and one that has not begun.
    for column, content in (
        ("finetune", {"status": "preempted", "top1": 1.0}),
        ("depth", {"status": "failed", "reason": "out of memory"}),
        ("coco", None),
    ):
        run = tmp_path / "scratch" / column / "seed_0"
        run.mkdir(parents=True)
        if content:
            (run / "summary.json").write_text(json.dumps(content))
        cells.append({"row": "scratch", "column": column, "seed": 0, "run": str(run)})
    more = {"recipe": "r", "unchanged": True, "data": "FOLDER"}
    rows = [{"name": n, "kind": n, "label": n, "source": n} for n in ROWS]
    rows[0] |= {"teacher": "teacher", "scratch": "scratch"}
    columns = [
        {"name": n, "title": n, "scores": [s | {"lower_is_better": n == "depth"} for s in scores]}
        for n, scores in SCORES.items()
    ]
    published = [
        {"row": "student", "column": "finetune", "figures": {"top1": 85}, "same_settings": True},
        {"row": "student", "column": "depth", "figures": {"rmse": 0.352}, "same_settings": False},
    ]
    content = {"rows": rows, "columns": columns, "published": published}
    content["cells"] = [cell | more for cell in cells]
    (tmp_path / SUMMARY).write_text(json.dumps(content))
    return tmp_path


def test_figures_differences_and_gaps(table: Path) -> None:
    summary, (scores, differences), files = write_table(table)
    cells = {
        label: row for label, *row in zip(*(column.cells for column in scores.columns), strict=True)
    }
    assert cells["student"] == ["85.10 +- 0.14", "0.352", "-", "-"]
    assert cells["  in the paper"] == ["85.0", "(0.352)", "", ""]
    assert cells["scratch"] == ["...", "failed", "...", "..."]
    assert "Less is better: RMSE." in scores.caption
    assert "depth/seed_0: out of memory" in scores.caption
    shown = list(zip(*(column.cells for column in differences.columns), strict=True))
    assert shown[0] == ("student less teacher", "+2.20 +- 0.28", "-0.064", "", "")
    assert shown[1] == ("student less scratch", "", "", "", "")
    assert "Below 0 is better: RMSE." in differences.caption
    (first, second) = summary["differences"]
    assert first["seeds"] == pytest.approx([2.0, 2.4])
    assert (second["column"], second["deviation"]) == ("depth", None)
    assert json.loads(files[0].read_text())["differences"][0]["mean"] == pytest.approx(2.2)
    assert "85.10 +- 0.14" in files[1].read_text()
    assert Image.open(files[2]).size[0] > 900
    assert {"+2.20 +- 0.28", "(0.352)", "failed"} <= set(check_page(files[3]).words)


def test_a_row_that_predicts_a_single_class_is_said(table: Path) -> None:
    folder = table / "teacher" / "finetune" / "seed_0"
    _, (scores, _), _ = write_table(table, single_class=lambda run: run == folder)
    lines = [line for line in scores.caption.splitlines() if "the same class" in line]
    assert [line.partition(":")[0] for line in lines] == ["teacher, finetune, seed 0"]


def test_columns_without_cells_are_named_alone(table: Path) -> None:
    summary = json.loads((table / SUMMARY).read_text())
    summary["cells"] = [
        cell | {"unchanged": False, "changed": {"optim.max_steps": [0, 3], "data.x": [None, 8]}}
        for cell in summary["cells"]
        if (cell["row"], cell["column"]) == ("student", "finetune")
    ]
    (table / SUMMARY).write_text(json.dumps(summary))
    _, (scores, _), files = write_table(table)
    assert [column.header for column in scores.columns] == ["model", "top-1 %"]
    assert list(scores.columns[1].cells) == ["85.10 +- 0.14", "85.0", "-", "-"]
    assert scores.caption == "-: not trained.\nNot trained: depth, coco."
    words = set(check_page(files[3]).words)
    changed = "r, changed (the recipe's own in brackets): optim.max_steps 3 (0), data.x 8 (none)"
    assert {"not trained", f"{changed}; on FOLDER; 2 seeds"} <= words


def test_it_is_made_again_as_runs_go_on(table: Path) -> None:
    write_table(table)
    run = table / "scratch" / "coco" / "seed_0"
    (run / "summary.json").write_text(json.dumps({"status": "done", "AP": 0.123}))
    # Its dataset has no masks: there is no such score.
    summary, (scores, _), _ = write_table(table)
    assert [list(column.cells)[-1] for column in scores.columns[3:]] == ["12.3", ""]
    assert summary["cells"][-1]["scores"] == {"AP": 0.123}


def test_it_is_made_again_from_another_folder(table: Path, monkeypatch) -> None:
    summary = json.loads((table / SUMMARY).read_text())
    for cell in summary["cells"]:
        cell["run"] = f"transfer/{cell['row']}/{cell['column']}/seed_{cell['seed']}"
    (table / SUMMARY).write_text(json.dumps(summary))
    moved = table.rename(table.with_name("moved"))
    monkeypatch.chdir(moved.parent)
    found, _, _ = write_table(Path("moved"))
    assert found["cells"][0]["scores"] == {"top1": 85.0}
    assert found["cells"][0]["run"] == "moved/student/finetune/seed_0"


def test_a_folder_without_a_table_is_refused(tmp_path: Path) -> None:
    for content in (None, "{", "{}", "[]"):
        if content:
            (tmp_path / SUMMARY).write_text(content)
        with pytest.raises(ConfigError, match=r"^--out: "):
            write_table(tmp_path)
