"""The doctor's table: one screen, a verdict a line, what stops a run stops it with 1."""

from __future__ import annotations

import fcntl
import os
import platform
import re
import struct
import subprocess
import sys
import termios
from importlib.util import find_spec

import pytest

from fd_large.cli import doctor
from fd_large.cli import main as cli
from fd_large.cli.doctor_checks import Finding
from fd_large.engine.zero import compiled_ops
from fd_large.errors import LaunchError
from fd_large.ranks.launch import Launch

pytestmark = pytest.mark.usefixtures("plain_environment")


def test_one_screen_where_everything_needed_is_here(tmp_path, capsys):
    compiled_ops.ops()  # The first call warns; in a process of the doctor's own nobody sees that.
    capsys.readouterr()
    assert cli.main(["doctor", "--run_dir", str(tmp_path / "runs")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert 16 <= len(lines) <= 36
    assert max(map(len, lines)) <= 100
    assert lines[-1] == "Nothing stops training here."
    names = [name for group in doctor.GROUPS for name in group]
    # Every line has its place, and every place its line.
    starts = [text for text in lines[:-1] if not text.startswith(" ")]
    assert len(starts) == len(names)
    for name, text in zip(names, starts, strict=True):
        assert text.startswith(f"{name} ")
        assert text[len(name) :].split()[0] in ("ok", "-", "slow", "low", "missing", "check")
    assert not (tmp_path / "runs").exists()


def test_full_adds_the_reports_of_torch_and_deepspeed(tmp_path, monkeypatch, capfd):
    assert all(map(find_spec, doctor.REPORTS))
    monkeypatch.setattr(doctor, "REPORTS", ("platform",))  # The real ones take ten seconds.
    assert cli.main(["doctor", "--full", "--run_dir", str(tmp_path)]) == 0
    said = capfd.readouterr().out
    assert said.rstrip().endswith(platform.platform())
    assert "Nothing stops training here." in said


@pytest.mark.parametrize(("columns", "width"), [(60, 60), (90, 90), (200, 100), (0, 100)])
def test_lines_are_as_wide_as_the_terminal(columns, width, monkeypatch):
    ours, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))
    with os.fdopen(theirs, "w") as out:
        monkeypatch.setattr(doctor.terminal, "out", lambda: out)
        monkeypatch.delenv("COLUMNS", raising=False)
        doctor._print({"packages": Finding("word " * 60)})
        text = os.read(ours, 1 << 16).decode()
    os.close(ours)
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    assert max(len(line.rstrip()) for line in lines) in range(width - 5, width + 1)


def test_a_run_folder_that_cannot_be_written_stops_and_the_remedy_is_told(capsys):
    assert cli.main(["doctor", "--run_dir", "/proc/runs"]) == 1
    out = capsys.readouterr().out
    assert "Training cannot start: run folder." in out
    assert "/proc/runs (proc)" in out
    assert "-> Name a folder that can be written: --run_dir" in out


def test_help_needs_no_torch():
    code = (
        "import sys; from fd_large.cli.main import main\n"
        "main(['doctor', '--help'])\n"
        "assert 'torch' not in sys.modules"
    )
    told = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "--local_disk" in told.stdout


def test_half_an_environment_of_ranks_is_told_in_the_table(monkeypatch, capsys, tmp_path):
    # DeepSpeed leaves them behind where a test before has started it in this process.
    for name in ("WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("RANK", "0")
    assert cli.main(["doctor", "--run_dir", str(tmp_path)]) == 1
    out = capsys.readouterr().out
    assert "WORLD_SIZE" in out
    assert "Training cannot start: launcher." in out


@pytest.mark.parametrize("advice", [" Choose a free port.", " Start no more ranks than GPUs."])
def test_ranks_that_do_not_meet_have_the_advice_of_their_error(advice, monkeypatch):
    message = "local rank 1 has no GPU; got 1, expected 2."
    launch = Launch(
        launcher="torchrun",
        rank=1,
        world_size=2,
        local_rank=1,
        local_world_size=2,
        master_addr="localhost",
        master_port=1,
    )

    def start(*_, **__):
        raise LaunchError(f"launch: {message}{advice}")

    monkeypatch.setattr("fd_large.ranks.distributed.start", start)
    finding = doctor._meet(launch)
    assert f"{finding.found} {finding.remedy}".strip() == message + advice
