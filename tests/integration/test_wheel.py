"""The wheel, installed outside of the repository: its command, its files, three steps."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
from launch import ROOT

THREE_STEPS = """
--optim.max_steps 3 --eval.every 0 --eval.views 2 --data.workers 0
--data.image_size 64 --student.architecture.image_size 64 --student.architecture.embed_dim 12
--student.architecture.depths 1 1 --student.architecture.num_heads 1 2
--batch.global_batch_size 4 --batch.micro_batch_size 4
"""


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An environment with the wheel, and beside it what this one has but for its own fd_large."""
    folder = tmp_path_factory.mktemp("wheel")
    source, environment = folder / "source", folder / "environment"
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=True)
    for name in filter(None, listed.stdout.decode().split("\0")):
        if name.startswith(("fd_large/", "ds_configs/", "slurm/")) or "/" not in name:
            (source / name).parent.mkdir(parents=True, exist_ok=True)
            (source / name).write_bytes((ROOT / name).read_bytes())
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    made = ["wheel", "--no-deps", "--no-build-isolation", "--no-index", "-w", folder, source]
    subprocess.run([*pip, *made], check=True, timeout=300)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", environment], check=True)
    (wheel,) = folder.glob("fd_large-*.whl")
    python = environment / "bin/python"
    subprocess.run(
        [*pip, "--python", python, "install", "--no-deps", "--no-index", wheel], check=True
    )
    (packages,) = environment.glob("lib/python*/site-packages")
    # Paths that a .pth file names are no sites: what is installed there in editable mode stays out.
    (packages / "others.pth").write_text(sysconfig.get_path("purelib"))
    return environment


def run(installed: Path, folder: Path, *words: str) -> str:
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME")}
    done = subprocess.run(
        [*map(str, words)], cwd=folder, env=clean, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


def test_the_command_and_the_files_that_travel(installed: Path, tmp_path: Path) -> None:
    command = installed / "bin/fd-large"
    assert run(installed, tmp_path, command, "--version").startswith("fd_large 0.")
    run(installed, tmp_path, command, "init", "cluster")
    assert (tmp_path / "cluster/launch.sh").is_file()


def test_three_steps_of_the_quick_start(installed: Path, tmp_path: Path) -> None:
    """As a launcher starts it: `deepspeed --module fd_large.train` runs this on every rank."""
    words = ("-m", "fd_large.train", "--deepspeed_config", "zero3", *THREE_STEPS.split())
    said = run(installed, tmp_path, installed / "bin/python", *words)
    assert "done, 3 of 3 steps" in said
    found = run(
        *(installed, tmp_path, installed / "bin/python", "-c"),
        "import fd_large; print(fd_large.__file__)",
    )
    assert found.startswith(str(installed))
