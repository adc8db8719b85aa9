"""The runs below a folder: which are found, and what their files say."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from fd_large.report.run_files import read_run
from fd_large.report.run_list import FAILED, KILLED, STOPPED, ListedRun, find_runs, state_of


def store(folder: Path, *evaluations: dict[str, float], task: str = "distillation") -> Path:
    folder.mkdir(parents=True)
    recipe = {"name": "mine", "data": {}, "task": {"name": task}, "optim": {"max_steps": 0}}
    (folder / "recipe.json").write_text(json.dumps(recipe))
    if evaluations:
        text = "".join(json.dumps(row) + "\n" for row in evaluations)
        (folder / "evaluations.jsonl").write_text(text)
    return folder


def change_recipe(folder: Path, **sections: Any) -> None:
    recipe = json.loads((folder / "recipe.json").read_text())
    (folder / "recipe.json").write_text(json.dumps(recipe | sections))


def listed(folder: Path, state: str = STOPPED) -> ListedRun:
    return ListedRun(folder, state, read_run(folder, newest_row=True))


def found(root: Path) -> list[str]:
    return [str(path.relative_to(root)) for path in find_runs(root, pytest.fail)]


def test_runs_at_any_depth_come_in_the_order_of_names(tmp_path):
    for name in ("b", "a/2", "a/10", "a/2/inside", ".hidden", "a/2/checkpoints/no_run"):
        store(tmp_path / name)
    (tmp_path / "lost" / "checkpoints" / "step_00000001").mkdir(parents=True)
    (tmp_path / "no_run" / "deep").mkdir(parents=True)
    assert found(tmp_path) == ["a/10", "a/2", "a/2/inside", "b", "lost"]


def test_of_several_students_each_is_a_run(tmp_path):
    for name in ("group", "group/students/large", "group/students/small"):
        store(tmp_path / name)
    assert found(tmp_path) == ["group/students/large", "group/students/small"]


def test_a_link_is_followed_to_a_run_elsewhere_alone(tmp_path):
    store(tmp_path / "runs" / "here")
    store(tmp_path / "other_disk" / "there")
    links = {"latest": "runs/here", "linked": "other_disk/there", "up": "runs", "all": "other_disk"}
    for name, target in links.items():
        (tmp_path / "runs" / name).symlink_to(tmp_path / target)
    assert found(tmp_path / "runs") == ["here", "linked"]


def test_a_folder_that_cannot_be_read_leaves_the_others(tmp_path, monkeypatch):
    store(tmp_path / "a")
    store(tmp_path / "b")
    scandir = os.scandir

    def closed(path):
        if Path(path).name == "a":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr("fd_large.report.run_list.os.scandir", closed)
    errors = []
    assert [path.name for path in find_runs(tmp_path, errors.append)] == ["b"]
    assert [str(tmp_path / "a") in str(error) for error in errors] == [True]


def test_the_best_value_goes_by_the_task_and_not_by_the_state_before_training(tmp_path):
    rows = [(0, 0.1, 9.0), (5, 0.3, 2.0), (10, 0.2, 7.0), (15, 0.2, 7.0), (20, float("nan"), 1.0)]
    rows = [{"update": n, "held_out_loss": low, "held_out_cosine": high} for n, low, high in rows]
    run = listed(store(tmp_path / "run", *rows))
    assert run.best("held_out_loss") == (0.2, 10)
    assert run.best("held_out_cosine") == (7.0, 10)
    assert run.last("held_out_cosine") == (1.0, 20)
    assert run.best("test_knn") is run.last("test_knn") is None
    assert listed(store(tmp_path / "young", rows[0])).best("held_out_loss") is None


@pytest.mark.parametrize(
    ("task", "lower", "higher"),
    [
        ("distillation", ["held_out_loss", "held_out_clip_loss"], ["test_knn"]),
        ("depth", ["val_rmse", "val_silog", "val_abs_rel"], ["val_d1"]),
        ("finetune", ["test_loss"], ["test_top1"]),
        ("module:mine.py:KIND", ["test_loss"], ["test_score"]),
    ],
)
def test_of_an_earlier_versions_run_the_kind_of_task_says_what_is_better(
    task, lower, higher, tmp_path
):
    files = read_run(store(tmp_path / "run", task=task))
    assert [files.lower_is_better(name) for name in lower] == [True] * len(lower)
    assert not any(map(files.lower_is_better, higher))


def test_a_task_of_ones_own_has_recorded_what_is_better(tmp_path):
    folder = store(tmp_path / "run", task="module:mine.py:KIND")
    metrics = {"test/error": "error", "test/no_error": "share without an error"}
    recorded = {"metrics": metrics, "lower_is_better": ["error"]}
    (folder / "environment.json").write_text(json.dumps(recorded))
    files = read_run(folder)
    assert files.lower_is_better("test_error")
    assert not files.lower_is_better("test_no_error")


@pytest.mark.parametrize(
    ("status", "state"),
    [
        *[("done", "done"), ("preempted", STOPPED), ("interrupted", STOPPED), (None, KILLED)],
        *[("failed", FAILED), ("hung", FAILED), ("not saved", FAILED)],
    ],
)
def test_how_a_run_stands_by_its_summary(status, state, tmp_path):
    folder = store(tmp_path / "run")
    if status:
        (folder / "summary.json").write_text(json.dumps({"status": status}))
    assert state_of(read_run(folder)) == state


def test_a_run_that_goes_on_has_the_length_of_its_recipe(tmp_path):
    folder = store(tmp_path / "run")
    assert listed(folder).steps is None
    (folder / "summary.json").write_text(json.dumps({"total_updates": 7}))
    (folder / "metrics.jsonl").write_text(
        '{"update": 3, "loss": 0.5, "learning_rate": 0.1}\n{"update": 4, "lo'
    )
    run = listed(folder)
    assert (run.step, run.steps, run.loss) == (4, 7, 0.5)
    change_recipe(folder, optim={"max_steps": 9})
    assert (listed(folder).steps, listed(folder, "running").steps) == (7, 9)


def test_the_main_metric_is_the_recipes_own(tmp_path):
    row = {"update": 5, "held_out_best_constant": 1.0, "held_out_loss": 0.5, "test_knn": 60.0}
    folder = store(tmp_path / "run", row)
    assert listed(folder).main_metric == "held_out_loss"
    change_recipe(folder, eval={"best_metric": "test_knn"})
    assert listed(folder).main_metric == "test_knn"
