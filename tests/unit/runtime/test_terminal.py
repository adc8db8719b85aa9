"""What reaches the user and what only the log, tried in processes of their own."""

import subprocess
import sys
from datetime import datetime
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

# The log asks fd_large.ranks.distributed for the rank alone; the module itself would import torch.
START = """
import os, sys, logging, types, warnings, subprocess
from pathlib import Path
from fd_large import ranks
ranks.distributed = sys.modules["fd_large.ranks.distributed"] = types.ModuleType("distributed")
ranks.distributed.rank = lambda: RANK
from fd_large.runtime import logs, terminal
terminal.take()
logs.start(RANK)
log = logging.getLogger("fd_large.test")
log.warning("early")
logs.set_up(Path(sys.argv[1]))
"""


@pytest.fixture
def run(tmp_path):
    """Runs lines after the start of a rank; returns (code, stdout, stderr, log)."""

    def run(lines, rank=0, start=START):
        done = subprocess.run(
            [sys.executable, "-c", start.replace("RANK", str(rank)) + lines, str(tmp_path)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=120,
        )
        path = tmp_path / "logs" / f"rank_{rank:05d}.log"
        return done.returncode, done.stdout, done.stderr, path.read_text()

    return run


CHATTER = """
print("from print")
os.write(1, b"from C, descriptor 1\\n")
os.write(2, b"from C, descriptor 2\\n")
subprocess.run(["echo", "from a child"])
warnings.warn("from warnings")
logging.getLogger("compilers.C.base").info("gcc -c")
library = logging.getLogger("DeepSpeed")
library.info("from DeepSpeed")
log.info("from fd_large")
logging.getLogger("other").error("a library failed")
terminal.show_error("data.root: nothing there")
"""


def test_rank_0_says_its_own_lines_and_the_log_keeps_all(run):
    code, out, err, log = run(CHATTER)
    assert code == 0
    lines = [line.split("  ", 1) for line in out.splitlines()]
    assert [text for _, text in lines] == ["early", "from fd_large", "a library failed"]
    # A file, unlike a terminal, shows the date too: a batch job may run for days.
    assert all(datetime.strptime(when, "%Y-%m-%d %H:%M:%S") for when, _ in lines)
    assert err == "data.root: nothing there\n"
    for told in (
        *("early", "from print", "from C, descriptor 1", "from C, descriptor 2", "from a child"),
        *("from warnings", "gcc -c", "from DeepSpeed", "from fd_large", "a library failed"),
        "data.root: nothing there",
    ):
        assert told in log, told


def test_other_ranks_speak_only_when_they_fail(run):
    _, out, err, log = run(CHATTER + 'log.error("mine failed")\nraise RuntimeError("broken")', 1)
    texts = [line.split("  ", 1)[1] for line in out.splitlines()]
    assert texts == ["a library failed", "mine failed"]
    assert all(line.startswith("rank 1: ") for line in out.splitlines())
    assert err.endswith("RuntimeError: broken\n")
    assert "from fd_large" in log
    assert "RuntimeError: broken" in log


@pytest.mark.parametrize(
    ("lines", "code", "shown", "logged"),
    [
        ("raise KeyError('lost')", 1, "KeyError: 'lost'", "KeyError: 'lost'"),
        ("raise KeyboardInterrupt", -2, "interrupted", "KeyboardInterrupt"),
        # A death by signal leaves no Python that could write to the log.
        ("os.abort()", -6, "Fatal Python error: Aborted", ""),
    ],
)
def test_the_user_and_the_log_learn_how_a_rank_died(lines, code, shown, logged, run):
    got, _, err, log = run(f"def deep():\n    {lines}\ndeep()")
    assert got == code
    assert shown in err
    assert ("in deep" in err) == (shown != "interrupted")
    assert logged in log
    assert not logged or "in deep" in log


def test_what_was_taken_is_given_back(run):
    _, out, err, log = run("terminal.give_back()\nprint('later')\nraise RuntimeError('broken')")
    assert out.splitlines()[-1] == "later"
    assert "RuntimeError: broken" in err
    assert "later" not in log


def test_streams_that_are_not_the_descriptors_are_left_alone(capsys, monkeypatch):
    from fd_large.runtime import terminal

    monkeypatch.setenv("FORCE_COLOR", "1")  # As in a notebook.
    terminal.console.cache_clear()
    assert not terminal.console().is_terminal
    terminal.take()
    assert terminal.out() is sys.stdout
    terminal.console().print("seen")
    terminal.show_error("seen too")
    assert capsys.readouterr() == ("seen\n", "seen too\n")


def test_as_a_library_nothing_is_redirected(run):
    _, out, _, _ = run("print('seen')", start=START.replace("terminal.take()", ""))
    assert out.splitlines()[-1] == "seen"
