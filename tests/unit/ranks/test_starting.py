"""Signals that reach a rank before training catches them, in real processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import until

from fd_large.errors import Exit
from fd_large.ranks import starting

ROOT = Path(__file__).resolve().parents[3]
TRAIN = ROOT / "fd_large" / "train.py"
# In place of the command line, whose import begins when the file is there and does not end.
SLOW = """
import pathlib, sys, time
pathlib.Path({up!r}).touch()
{wait}
"""
WAITS = {
    "importing": "while True: time.sleep(0.01)",
    # As in a library that waits for the other ranks: no handler of Python's runs.
    "in a call": "import ctypes; lock = ctypes.c_buffer(64); "
    "take = ctypes.CDLL(None).pthread_mutex_lock; take(lock); take(lock)",
}


def rank_that_starts(folder: Path, wait: str, *before: str) -> subprocess.Popen[str]:
    """A process of train.py of a copy of the package in which the imports wait; it is there."""
    up = folder / "up"
    package = folder / "fd_large"
    package.mkdir()
    for path in (ROOT / "fd_large").iterdir():
        if path.name != "cli":
            (package / path.name).symlink_to(path)
    (package / "train.py").unlink()
    (package / "train.py").write_text(TRAIN.read_text())
    (package / "cli").mkdir()
    (package / "cli" / "__init__.py").write_text(SLOW.format(up=str(up), wait=wait))
    words = [*before, sys.executable, str(package / "train.py"), "--deepspeed_config", "zero1"]
    environ = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    process = subprocess.Popen(words, stderr=subprocess.PIPE, text=True, env=environ)
    until(up.exists, 60, "the rank imports")
    return process


@pytest.mark.parametrize("wait", WAITS)
@pytest.mark.parametrize("number", starting.CAUGHT)
def test_a_signal_while_a_rank_imports_is_no_crash(
    number: signal.Signals, wait: str, tmp_path: Path
) -> None:
    process = rank_that_starts(tmp_path, WAITS[wait])
    process.send_signal(number)
    _, said = process.communicate(timeout=60)
    assert process.returncode == Exit.AGAIN, said
    assert said.startswith(f"{number.name} before training began: ")
    assert said.count("\n") == 1


def test_a_signal_that_is_ignored_stays_ignored(tmp_path: Path) -> None:
    process = rank_that_starts(tmp_path, WAITS["importing"], "env", "--ignore-signal=TERM")
    process.send_signal(signal.SIGTERM)
    process.send_signal(signal.SIGUSR1)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, said.partition(" ")[0]) == (Exit.AGAIN, "SIGUSR1")


AFTER = """
import os, signal, sys
from fd_large.ranks.starting import leave_at_signals
leave_at_signals()
from fd_large.runtime.preemption import Preemption
hook = Preemption(120.0)
if sys.argv[1] == "during":
    os.kill(os.getpid(), signal.SIGUSR1)
    assert hook.wish().stop
hook.close()
os.kill(os.getpid(), signal.SIGUSR1)
sys.exit(3)
"""


@pytest.mark.parametrize(("when", "code"), [("after", -signal.SIGUSR1), ("during", 3)])
def test_training_catches_signals_itself_and_leaves_none_of_this(when: str, code: int) -> None:
    """After training a signal is what it is to any process, and after a stop it is ignored."""
    done = subprocess.run(
        [sys.executable, "-c", AFTER, when],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == code, done.stderr


OFF = """
import os, signal
from fd_large.ranks.starting import leave_at_signals
leave_at_signals()
from fd_large.engine.run import preemption_of
from fd_large.recipes import registry
run = registry.get("quickstart").with_fields({"runtime.preemption": False})
assert preemption_of(run, None, "python") is None
os.kill(os.getpid(), signal.SIGTERM)
"""


def test_a_recipe_that_catches_no_signals_gives_them_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", OFF],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == -signal.SIGTERM, done.stderr
