"""slurm/fd_swinv2g.sh with a stand-in for srun."""

from __future__ import annotations

import os
import stat
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_script(tmp_path: Path, *args: str, **environ: str) -> subprocess.CompletedProcess[str]:
    """Runs the batch script with a stand-in for srun that writes its arguments, one a line."""
    srun = tmp_path / "srun"
    srun.write_text(f'#!/bin/sh\nprintf "%s\\n" "$@" > "{tmp_path}/arguments"\nexit 7\n')
    srun.chmod(srun.stat().st_mode | stat.S_IXUSR)
    return subprocess.run(
        ["bash", str(ROOT / "slurm" / "fd_swinv2g.sh"), *args],
        env={
            "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
            "SLURM_SUBMIT_DIR": str(ROOT),
            "LOG_DIR": str(tmp_path / "logs"),
            **environ,
        },
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_slurm_script_hands_recipe_site_and_overrides_to_srun(tmp_path: Path) -> None:
    done = run_script(
        tmp_path,
        "--optim.epochs",
        "3",
        "--runtime.run_dir=a b",
        DATA_ROOT="/data/my images",
        TEACHER_SOURCE="random",
        SLURM_CPUS_PER_TASK="12",
    )
    assert done.returncode == 7, done.stderr  # srun's own
    arguments = (tmp_path / "arguments").read_text().splitlines()
    command = arguments.index("python")
    assert arguments[command:] == [
        "python",
        "fd_large/train.py",
        "--recipe",
        "fd_swinv2g",
        "--deepspeed_config",
        "ds_configs/zero3_hpz.json",
        "--data.root",
        "/data/my images",
        "--teacher.source",
        "random",
        "--optim.epochs",
        "3",
        "--runtime.run_dir=a b",
    ]
    options = arguments[:command]
    assert "--export=ALL" in options
    assert "--kill-on-bad-exit=1" in options
    assert "--distribution=block" in options
    assert "--cpus-per-task=12" in options
    assert f"--output={tmp_path}/logs/slurm-%x-%j-rank_%t.log" in options
    assert not any("gpus-per-task" in option for option in options)
    assert (tmp_path / "logs").is_dir()


@pytest.mark.parametrize("missing", ["DATA_ROOT", "TEACHER_SOURCE"])
def test_slurm_script_stops_before_srun_without_site_settings(missing: str, tmp_path: Path) -> None:
    given = {"DATA_ROOT": "/data", "TEACHER_SOURCE": "random"} | {missing: ""}
    done = run_script(tmp_path, **given)
    assert done.returncode == 2
    assert f"{missing} is empty" in done.stderr
    assert not (tmp_path / "arguments").exists()


def test_slurm_script_stops_outside_the_repository(tmp_path: Path) -> None:
    done = run_script(
        tmp_path, DATA_ROOT="/d", TEACHER_SOURCE="random", SLURM_SUBMIT_DIR=str(tmp_path)
    )
    assert done.returncode == 2
    assert "Submit from the repository root" in done.stderr
