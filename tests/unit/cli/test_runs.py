"""The command `runs`: the table, its order, and folders that are damaged or of others."""

from __future__ import annotations

import csv
import io
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from fd_large.checkpoint.owner import Owner
from fd_large.cli.main import main
from fd_large.ranks import processes

STORED = Path(__file__).resolve().parents[2] / "stored_runs" / "distillation"


@pytest.fixture
def root(tmp_path):
    """Three runs with a held-out loss at two steps each, and a rate of 0.1, 0.2, 0.3."""
    for number, losses in enumerate([(0.5, 0.4), (0.2, 0.6), (0.3, 0.3)]):
        folder = tmp_path / "runs" / f"run_{number}"
        shutil.copytree(STORED, folder, ignore=shutil.ignore_patterns("checkpoints"))
        change(folder, "recipe", optim={"base_lr": (number + 1) / 10, "max_steps": 16})
        rows = [{"update": 0, "held_out_loss": 0.0}]
        rows += [{"update": 2 + i, "held_out_loss": loss} for i, loss in enumerate(losses)]
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (folder / "evaluations.jsonl").write_text(text)
    return tmp_path / "runs"


def change(folder: Path, file: str, **values: Any) -> None:
    """Replaces entries of a JSON file."""
    path = folder / f"{file}.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def rows_of(root: Path, capsys, *more: str) -> list[dict[str, str]]:
    assert main(["runs", str(root), "--csv", *more]) == 0
    return list(csv.DictReader(io.StringIO(capsys.readouterr().out)))


def own(folder: Path, pid: int, start: str = "0" * 32) -> None:
    """Makes another process of this machine the owner of a run."""
    started = processes.started(pid) or 0
    owner = replace(Owner.here(), start=start, pid=pid, pid_started=started, folder=str(folder))
    (folder / "owner.json").write_text(json.dumps(asdict(owner)))


def test_every_run_is_a_row_in_the_order_of_names(root, capsys, wide):
    assert main(["runs", str(root)]) == 0
    shown = capsys.readouterr().out
    lines = [line for line in shown.splitlines() if line[2:].startswith("run_")]
    assert [line.split()[1] for line in lines] == ["run_0", "run_1", "run_2"]
    for cell in ("fd_swinv2_base", "stopped", "5 of 16", "0.20452", "held_out_loss 0.4 at 3"):
        assert cell in lines[0]


@pytest.mark.parametrize("name", ["held_out_loss", "held_out/loss"])
def test_the_best_run_is_on_top(name, root, capsys):
    rows = rows_of(root, capsys, "--best", name)
    assert [row["run"] for row in rows] == ["run_1", "run_2", "run_0"]
    assert [row["best held_out_loss"] for row in rows] == ["0.2", "0.3", "0.4"]
    assert [row["step of best held_out_loss"] for row in rows] == ["2", "2", "3"]
    assert [row["held_out_loss"] for row in rows] == ["0.6", "0.3", "0.4"]


def test_a_run_without_the_number_comes_last(root, capsys):
    (root / "run_1" / "evaluations.jsonl").unlink()
    rows = rows_of(root, capsys, "--best", "held_out_loss")
    assert [row["run"] for row in rows] == ["run_2", "run_0", "run_1"]
    assert rows[-1]["best held_out_loss"] == ""


def test_fields_are_shown_and_choose(root, capsys):
    change(root / "run_0", "summary", status="done")
    rows = rows_of(root, capsys, "--show", "optim.base_lr", "data.root")
    assert [row["optim.base_lr"] for row in rows] == ["0.1", "0.2", "0.3"]
    for words, left in [
        (["optim.base_lr=2e-1"], ["run_1"]),
        (["state=stopped"], ["run_1", "run_2"]),
        (["state=stopped", "optim.base_lr=0.3"], ["run_2"]),
        (["student=swinv2_base", "state=done"], ["run_0"]),
        (["state=running"], []),
        (["state=Damaged"], []),
    ]:
        assert [row["run"] for row in rows_of(root, capsys, "--where", *words)] == left


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--best", "held_out_los"], "held_out_loss"),
        (["--show", "optim.base_rl"], "optim.base_lr"),
        (["--where", "optim.base_rl=1"], "optim.base_lr"),
        (["--where", "state"], "FIELD=VALUE"),
        (["--where", "state=stoped"], "nearest: stopped"),
        (["--where", "state=hung"], "nearest: running"),
    ],
)
def test_a_name_that_no_run_has_is_one_sentence(words, named, root, capsys):
    assert main(["runs", str(root), *words]) == 2
    printed = capsys.readouterr()
    assert not printed.out
    assert len(printed.err.splitlines()) == 1
    assert words[0] in printed.err
    assert named in printed.err


def test_a_folder_without_runs_is_one_sentence(tmp_path, capsys):
    (tmp_path / "file").touch()
    for path in (tmp_path, tmp_path / "file", tmp_path / "missing"):
        assert main(["runs", str(path)]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert str(path) in line


def test_a_run_with_a_living_owner_runs_and_one_whose_owner_is_gone_was_killed(root, capsys):
    own(root / "run_0", os.getppid())
    own(root / "run_1", 2**31 - 1)
    # It said how it ended before it was gone.
    own(root / "run_2", 2**31 - 1, start="1" * 32)
    change(root / "run_2", "summary", status="failed", start="1" * 32)
    rows = rows_of(root, capsys)
    assert [row["state"] for row in rows] == ["running", "killed", "failed"]


def test_of_several_students_the_start_owns_all(root, capsys):
    students = root / "group" / "students"
    students.mkdir(parents=True)
    (root / "run_0").rename(students / "small")
    shutil.copy(students / "small" / "recipe.json", root / "group")
    own(root / "group", os.getppid())
    rows = rows_of(root, capsys, "--where", "state=running")
    assert [row["run"] for row in rows] == ["group/students/small"]


DAMAGE = {
    "recipe.json": ["", "{", "[]", "{}", '{"name": 1, "data": {}}', "\0", "[" * 5000],
    "summary.json": ["{", "[]", '{"status": 3}', '{"best": 4}'],
    "environment.json": ["{", '{"metrics": [1]}', '{"metrics": {"a": {}}}'],
    "evaluations.jsonl": ["{}\n{}\n", '{"update": 1, "a": "text"}\n', '{"update": -1}\n'],
    "metrics.jsonl": ['{"update": 1, "loss": "low", "learning_rate": 1}\n'],
}


@pytest.mark.parametrize(
    ("name", "text"), [(name, text) for name, texts in DAMAGE.items() for text in texts]
)
def test_a_damaged_run_is_a_row(name, text, root, capsys):
    (root / "run_1" / name).write_text(text)
    states = {row["run"]: row["state"] for row in rows_of(root, capsys)}
    assert states == {"run_0": "stopped", "run_1": "damaged", "run_2": "stopped"}
    assert main(["runs", str(root)]) == 0
    assert name in capsys.readouterr().out


@pytest.mark.parametrize(
    "section",
    [
        {"student": []},
        {"student": {"model": 3}},
        {"student": {"model": "vit", "architecture": {"depths": "no"}}},
        {"student": {"model": "module:evil.py:made", "architecture": {}}},
        {"task": "depth"},
        {"task": {"name": ["depth"]}},
        {"optim": 3},
        {"optim": {"max_steps": "many"}},
        {"eval": 3},
        {"eval": {"best_metric": ["x"]}},
        {"teachers": []},
    ],
    ids=str,
)
def test_a_recipe_of_something_else_is_a_row(section, root, capsys, monkeypatch):
    monkeypatch.chdir(root)
    Path("evil.py").write_text("open('ran', 'w').close()\ndef made(): ...\n")
    change(root / "run_1", "recipe", **section)
    rows = rows_of(root, capsys, "--best", "held_out_loss")
    assert [row["run"] for row in rows] == ["run_1", "run_2", "run_0"]
    assert main(["runs", str(root)]) == 0
    assert not Path("ran").exists()


def test_what_a_file_says_commands_neither_a_terminal_nor_a_spreadsheet(root, capsys):
    change(root / "run_1", "recipe", name="=1+1\x1b[2J")
    (root / "run_0").rename(root / "\x1b]0;title")
    text = '{"update": 4, "\x1b[31m": 1}\n'.replace("\x1b", "\\u001b")
    (root / "run_2" / "evaluations.jsonl").write_text(text)
    for words in ([], ["--csv"]):
        assert main(["runs", str(root), *words]) == 0
        printed = capsys.readouterr().out
        assert "\x1b" not in printed
    assert "'=1+1?[2J" in printed


def test_no_torch_is_imported(root):
    code = f"""
import sys
from fd_large.cli.main import main
assert main(["runs", {str(root)!r}, "--best", "held_out_loss"]) == 0
assert main(["runs", {str(root)!r}, "--csv"]) == 0
print([name for name in ("torch", "deepspeed", "timm", "matplotlib") if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"
