"""`transfer --slurm`: the jobs that sbatch gets, and what stands in their way."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import transfer_toy

from fd_large.cli.main import main
from fd_large.cli.train import parse_train

# Keeps its arguments, a line for each job; numbers count from 1.
SBATCH = """#!/bin/bash
printf '%s\\t' "$@" >>"$JOBS"; echo >>"$JOBS"
printf '%s' "${MASTER_PORT:-}" >>"$JOBS.port"
[[ $* == *nodes=9* ]] && { echo "error: too many nodes" >&2; exit 1; }
wc -l <"$JOBS"
"""
# Job 1 still runs; Slurm has forgotten the others.
SQUEUE = """#!/bin/bash
[[ $* == *--jobs=1 ]] && echo 1 || { echo "Invalid job id" >&2; exit 1; }
"""


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    return transfer_toy.write_toy(tmp_path_factory.mktemp("toy"))


@pytest.fixture
def jobs(tmp_path, monkeypatch):
    """Returns the arguments of each job that was submitted."""
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, text in (("sbatch", SBATCH), ("squeue", SQUEUE)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("JOBS", str(tmp_path / "jobs"))
    monkeypatch.chdir(Path(__file__).resolve().parents[4])

    def read() -> list[list[str]]:
        lines = (tmp_path / "jobs").read_text().splitlines()
        return [line.rstrip("\t").split("\t") for line in lines]

    return read


def test_each_training_is_a_job_and_the_table_comes_last(toy, jobs, tmp_path, monkeypatch, capsys):
    out = tmp_path / "a table"
    words = [*transfer_toy.words(toy, out), "--rows", "student", "--only", "linear", "coco"]
    words += ["--slurm", "--sbatch", "nodes=2", "partition=gpu"]
    assert main(words) == 0
    linear, coco, table = jobs()
    assert (tmp_path / "jobs.port").read_text() == "", "jobs meet at ports of their own"
    for job, column in ((linear, "linear"), (coco, "coco")):
        place = job.index("slurm/transfer.sh")
        folder = out / "mine" / column / "seed_0"
        options = ["--job-name", "--output", "--nodes=2", "--partition=gpu"]
        assert job[0] == "--parsable"
        assert all(one.startswith(name) for one, name in zip(job[1:place], options, strict=True))
        # What train.py takes is the cell's recipe.
        run = parse_train(job[place + 1 :]).run
        assert run.to_dict() == json.loads((folder / "cell.json").read_text())["recipe"]
        assert run.data.root in job
        assert run.student.init in job
    assert "--dependency=afterany:1:2" in table
    assert "--partition=gpu" in table
    assert "--nodes=2" not in table
    assert table[-3:] == ["slurm/transfer_table.sh", "--out", str(out)]

    # What waits or runs is not submitted twice; job 2 is gone without a result.
    capsys.readouterr()
    assert main(words) == 0
    assert "linear/seed_0: job 1, submitted before" in capsys.readouterr().out
    again, table = jobs()[3:]
    assert str(out / "mine/coco/seed_0") in again
    assert "--dependency=afterany:1:4" in table


def test_what_stands_in_the_way(toy, jobs, tmp_path, monkeypatch, capsys):
    words = [*transfer_toy.words(toy, tmp_path / "out"), "--rows", "student", "--only", "linear"]
    cases = {
        "--sbatch: not an option of sbatch; got '--nodes=2'": ["--slurm", "--sbatch=--nodes=2"],
        "--sbatch: no job is submitted": ["--sbatch", "nodes=2"],
        "sbatch refused the job; got error: too many nodes": ["--slurm", "--sbatch", "nodes=9"],
    }
    for said, more in cases.items():
        assert main([*words, *more]) == 2
        assert said in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert main([*words, "--slurm"]) == 2
    assert "no transfer.sh here" in capsys.readouterr().err
    (tmp_path / "transfer.sh").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert main([*words, "--slurm"]) == 2
    assert "no command sbatch" in capsys.readouterr().err


def test_a_job_is_handed_on_the_names_of_own_code_and_no_others(toy, jobs, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("class Lion: ...\n")
    own, out = f"module:{tmp_path}/mine.py:Lion", tmp_path / "table"
    words = [*transfer_toy.words(toy, out), "--rows", "student", "--only", "linear", "--slurm"]
    assert main([*words, "--linear.optim.name", own]) == 0
    job, _ = jobs()
    assert job[-2:] == ["--allow_code", own]
