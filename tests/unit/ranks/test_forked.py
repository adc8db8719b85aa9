"""Forked ranks: what they know of their place, signals to all of them, the code of the first."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

import pytest
from waiting import until

from fd_large.errors import LaunchError
from fd_large.ranks.forked import check_alone

# pytest's own process has threads and is no place to fork from.
HEAD = """
import os, signal, sys, time
from pathlib import Path
from fd_large.ranks import forked
from fd_large.ranks.launch import RANK_VARIABLES, find_launch
for name in RANK_VARIABLES: os.environ.pop(name, None)
folder = Path(sys.argv[1])
def place():
    launch = find_launch()
    assert launch.is_on_one_host and launch.local_world_size == launch.world_size
    assert launch.rank == launch.local_rank
    (folder / str(launch.rank)).write_text(str(launch.master_port))
    return launch.rank
"""


def start(
    work: str, folder: Path, *, seconds: float = 30.0, number: int = 2
) -> subprocess.Popen[str]:
    """Starts ranks of a function `work`, which are killed so many seconds after a failure."""
    lines = [
        HEAD,
        textwrap.dedent(work),
        f"forked.SECONDS_AFTER_A_FAILURE = {seconds}",
        f"code = forked.run_ranks({number}, work)",
        "assert int(os.environ.get('RANK', -1)) < 0",
        "sys.exit(code)",
    ]
    command = [sys.executable, "-c", "\n".join(lines), str(folder)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def ended(work: str, folder: Path, **more: Any) -> tuple[int, str, str]:
    process = start(work, folder, **more)
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_each_rank_knows_its_place_and_the_common_port(tmp_path):
    work = """
    def work():
        sys.stdout.write(f"rank {place()};")
        return 0
    """
    code, out, err = ended(work, tmp_path)
    assert (code, err) == (0, "")
    assert sorted(out.split(";")) == ["", "rank 0", "rank 1"]
    assert (tmp_path / "0").read_text() == (tmp_path / "1").read_text()


@pytest.mark.parametrize(
    ("end", "code"), [("return 3", 3), ("os.kill(os.getpid(), 9)", 137), ("raise KeyError(7)", 1)]
)
def test_the_first_rank_that_fails_gives_the_code_and_the_others_end(end, code, tmp_path):
    work = f"""
    def work():
        if place():
            {end}
        time.sleep(600)
    """
    found, _, err = ended(work, tmp_path, seconds=0.1)
    assert found == code
    assert ("KeyError: 7" in err) == (code == 1)


def test_ranks_that_have_saved_are_waited_for(tmp_path):
    work = """
    def work():
        if place():
            return 75
        time.sleep(1)
        (folder / "saved").touch()
        return 75
    """
    assert ended(work, tmp_path, seconds=0.1)[0] == 75
    assert (tmp_path / "saved").exists()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR1])
def test_a_signal_reaches_every_rank(number, tmp_path):
    work = f"""
    def caught(*_):
        (folder / f"caught_{{os.environ['RANK']}}").touch()
        os._exit(75)
    def work():
        signal.signal({number:d}, caught)
        place()
        time.sleep(600)
    """
    process = start(work, tmp_path)
    try:
        until(
            lambda: {"0", "1"} <= {path.name for path in tmp_path.iterdir()},
            *(30, lambda: "the ranks did not start"),
        )
        process.send_signal(number)
        assert process.wait(30) == 75
    finally:
        process.kill()
        process.communicate()
    assert {"caught_0", "caught_1"} <= {path.name for path in tmp_path.iterdir()}


def test_a_failure_after_a_save_and_another_end_the_ranks_that_are_left(tmp_path):
    work = """
    def work():
        rank = place()
        if rank == 3:
            (folder / "pid").write_text(str(os.getpid()))
            time.sleep(600)
        while not (folder / "pid").exists():
            time.sleep(0.01)
        time.sleep(0.3 * rank)
        return (75, 1, 1)[rank]
    """
    code, _, err = ended(work, tmp_path, number=4, seconds=0.5)
    assert (code, err) == (75, "")
    assert not Path("/proc", (tmp_path / "pid").read_text()).exists()


def test_a_process_that_is_no_rank_has_no_say(tmp_path):
    """As process 1 of a container it gets the orphans of its ranks; prctl(36) makes it like one."""
    work = """
    import ctypes
    ctypes.CDLL(None).prctl(36, 1, 0, 0, 0)
    def work():
        if place() == 0:
            orphan = ["sh", "-c", "sh -c 'sleep 0.3; kill -9 $$' & "]
            __import__("subprocess").run(orphan)
            time.sleep(1)
        return 0
    """
    assert ended(work, tmp_path, seconds=0.1)[0] == 0


@pytest.mark.parametrize(
    ("end", "code"),
    [("raise KeyboardInterrupt", 130), ("sys.exit(3)", 3), ("sys.exit()", 0), ("sys.exit('x')", 1)],
)
def test_a_rank_that_leaves_by_an_exception_keeps_its_code(end, code, tmp_path):
    found, _, err = ended(f"def work():\n    place()\n    {end}", tmp_path)
    assert found == code
    assert "Traceback" not in err


def test_signals_wait_until_a_rank_is_prepared(tmp_path):
    work = """
    from fd_large.ranks.starting import leave_at_signals
    run = forked.run_ranks
    def prepare():
        os.kill(os.getpid(), signal.SIGTERM)
        leave_at_signals()
    forked.run_ranks = lambda number, work: run(number, work, prepare=prepare)
    def work():
        time.sleep(600)
    """
    assert ended(work, tmp_path)[0] == 75


def test_a_rank_of_another_launcher_starts_none(monkeypatch):
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "2"), ("LOCAL_RANK", "0")):
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(LaunchError, match="got 2 by python"):
        check_alone()
