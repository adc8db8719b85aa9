"""What reaches the user and what only the log, tried in processes of their own."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[3]

START = """
import os, sys, logging, warnings, subprocess
from pathlib import Path
from fd_large.runtime import logs, terminal
terminal.take()
logs.start(RANK)
log = logging.getLogger("fd_large.test")
log.warning("early")
from fd_large import distributed
distributed.rank = lambda: RANK
logs.set_up(Path(sys.argv[1]))
"""


@pytest.fixture
def run(tmp_path):
    """Runs lines after the start of a rank; returns (code, stdout, stderr, log)."""

    def run(lines, rank=0):
        done = subprocess.run(
            [sys.executable, "-c", START.replace("RANK", str(rank)) + lines, str(tmp_path)],
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
    assert [line[10:] for line in out.splitlines()] == [
        "early",
        "from fd_large",
        "a library failed",
    ]
    assert err == "data.root: nothing there\n"
    for told in (
        *("early", "from print", "from C, descriptor 1", "from C, descriptor 2", "from a child"),
        *("from warnings", "gcc -c", "from DeepSpeed", "from fd_large", "a library failed"),
        "data.root: nothing there",
    ):
        assert told in log, told


def test_other_ranks_speak_only_when_they_fail(run):
    _, out, err, log = run(CHATTER + 'log.error("mine failed")\nraise RuntimeError("broken")', 1)
    assert [line[8:] for line in out.splitlines()] == [
        out.splitlines()[0][8:18] + "a library failed",
        out.splitlines()[1][8:18] + "mine failed",
    ]
    assert all(line.startswith("rank 1: ") for line in out.splitlines())
    assert err.endswith("RuntimeError: broken\n")
    assert "from fd_large" in log
    assert "RuntimeError: broken" in log


def test_a_traceback_reaches_the_user_and_the_log(run):
    code, _, err, log = run("def deep():\n    raise KeyError('lost')\ndeep()")
    assert code == 1
    for text in (err, log):
        assert "Traceback (most recent call last)" in text
        assert "in deep" in text
        assert "KeyError: 'lost'" in text


def test_an_interrupt_is_one_word(run):
    _, _, err, log = run("raise KeyboardInterrupt")
    assert err == "interrupted\n"
    assert "Traceback" in log


def test_a_death_by_signal_leaves_the_stack_with_the_user(run):
    code, _, err, _ = run("def deep():\n    os.abort()\ndeep()")
    assert code == -6
    assert "Fatal Python error: Aborted" in err
    assert "in deep" in err


def test_what_was_taken_is_given_back(run):
    _, out, err, log = run("terminal.give_back()\nprint('later')\nraise RuntimeError('broken')")
    assert out.splitlines()[-1] == "later"
    assert "RuntimeError: broken" in err
    assert "later" not in log


def test_streams_that_are_not_the_descriptors_are_left_alone(capsys):
    from fd_large.runtime import terminal

    terminal.take()
    assert terminal.out() is sys.stdout
    terminal.console().print("seen")
    terminal.show_error("seen too")
    assert capsys.readouterr() == ("seen\n", "seen too\n")


def test_as_a_library_nothing_is_redirected(tmp_path):
    lines = START.replace("RANK", "0").replace("terminal.take()", "")
    done = subprocess.run(
        [sys.executable, "-c", lines + "print('seen')", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.stdout.splitlines()[-1] == "seen"
