"""What the kernel shows of processes, and calls that hang."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fd_large.errors import ConfigError
from fd_large.ranks import processes
from fd_large.ranks.processes import HIDDEN, briefly, check_workers, started, status


def test_a_process_and_its_parent() -> None:
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        found = status(child.pid)
        assert found is not None
        assert (found.parent, found.group) == (os.getpid(), os.getpgid(child.pid))
        assert not found.has_ended
        assert started(child.pid) == found.started >= (started(os.getpid()) or 0)
    finally:
        child.communicate()
    assert status(child.pid) is None
    assert started(child.pid) is None


@pytest.mark.parametrize(("cores", "most"), [(1, 64), (4, 64), (8, 128)])
def test_more_loading_processes_than_cores_have_use_of_are_refused(
    monkeypatch: pytest.MonkeyPatch, cores: int, most: int
) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(cores)))
    check_workers(most)
    words = rf"data\.workers: too many .* got {most + 1}, expected at most {most} .* {cores} core"
    with pytest.raises(ConfigError, match=words):
        check_workers(most + 1)


def test_a_process_that_its_parent_has_not_asked_about_has_ended() -> None:
    child = subprocess.Popen([sys.executable, "-c", ""])
    os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
    found = status(child.pid)
    assert found is not None
    assert found.has_ended
    assert started(child.pid) is None
    child.wait()


def test_a_name_with_blanks_and_parentheses(tmp_path) -> None:
    odd = tmp_path / "a ) b"
    odd.symlink_to(sys.executable)
    child = subprocess.Popen([odd, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        found = status(child.pid)
        assert found is not None
        assert found.parent == os.getpid()
    finally:
        child.communicate()


def test_a_process_of_another_user_may_be_hidden(monkeypatch) -> None:
    def refused(pid: int, number: int) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(processes, "status", lambda pid: None)
    monkeypatch.setattr(os, "kill", refused)
    assert started(1) == HIDDEN


def test_a_call_that_hangs_is_left_behind() -> None:
    goes_on, done = threading.Event(), []
    briefly(goes_on.wait, 60, seconds=0.05)
    assert not goes_on.is_set()
    goes_on.set()
    briefly(done.append, 1, seconds=60)
    assert done == [1]


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("/v/bin/python3 /v/bin/deepspeed --num_gpus 8 train.py", "deepspeed"),
        ("/v/bin/python3 -u -m deepspeed.launcher.launch --x", "deepspeed.launcher.launch"),
        ("python -m torch.distributed.run train.py", "torch.distributed.run"),
        ("python -W ignore -X dev /v/bin/torchrun train.py", "torchrun"),
        ("/v/bin/mpirun -n 2 python train.py", "mpirun"),
        ("/v/bin/hydra_pmi_proxy --control-port vm:1", "hydra_pmi_proxy"),
        ("/v/bin/python3 -m fd_large --ranks 2 train", "fd_large"),
        ("/v/bin/python3 /v/bin/fd-large --ranks=2 train", "fd-large"),
        ("/v/bin/python3 -m fd_large train --ranks 2", None),
        ("python train.py deepspeed", None),
        ("python -c mpirun", None),
        ("bash -c deepspeed train.py", None),
        ("vim deepspeed", None),
        ("python", None),
        ("", None),
    ],
)
def test_launchers_are_known_by_their_command_line(command: str, name: str | None) -> None:
    assert processes._launcher_name(command.split(" ")) == name


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_the_line_of_ancestors_changes_when_one_of_them_ends() -> None:
    assert next(processes._ancestors()) == os.getppid()
    # A process whose parent ends at once: its line is another one then.
    lines = (
        "import os, time; from fd_large.ranks import processes\n"
        "above = list(processes._ancestors())\n"
        "read, write = os.pipe()\n"
        "if os.fork(): os.read(read, 1); os._exit(0)\n"
        "assert list(processes._ancestors())[1:] == above\n"
        "parent = os.getppid(); os.write(write, b'.')\n"
        "while os.getppid() == parent: time.sleep(0.01)\n"
        "print(next(processes._ancestors()) != parent)"
    )
    told = subprocess.run([sys.executable, "-c", lines], stdout=subprocess.PIPE, text=True)
    assert told.stdout == "True\n"
