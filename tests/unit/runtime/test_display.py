"""A line at least every half minute without a terminal, one bar on a terminal."""

from __future__ import annotations

import io
import logging
import re
from itertools import pairwise

import pytest
from rich.console import Console
from waiting import until

from fd_large.ranks import activity
from fd_large.ranks.activity import Work
from fd_large.runtime import display, terminal
from fd_large.runtime.display import Bar, Lines, say, shown


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(activity, "_works", [])
    monkeypatch.setattr(terminal, "_said", float("-inf"))
    monkeypatch.setattr(terminal, "before_errors", [])


def test_a_line_after_every_silence_and_none_before():
    said = []
    look = Lines(said.append)
    look((), 0.0)
    whole, part = Work("export"), Work("model.safetensors", 100, "tensors")
    whole.began = part.began = start = 0.0  # Seconds add up to whole ones.
    for second in range(0, 100):
        part.reach(second)
        look(activity.current(), start + second)
    times = [int(re.search(r"(\d+) of 100", line)[1]) for line in said]
    assert times[0] <= 30
    assert all(later - earlier <= 30 for earlier, later in pairwise(times))
    assert len(said) == 3, "not more often than needed"
    assert said[0].startswith("model.safetensors, 25 of 100 tensors; ")
    assert "left" in said[0]


def test_what_others_said_counts(monkeypatch):
    said = []
    work, look = Work("training"), Lines(said.append)
    monkeypatch.setattr(terminal, "_said", work.began + 50)
    look((work,), work.began + 60)
    assert said == []
    look((work,), work.began + 50 + display.SECONDS_BETWEEN_LINES)
    assert len(said) == 1


@pytest.fixture
def screen(monkeypatch):
    stream = io.StringIO()
    console = Console(file=stream, force_terminal=True, width=80, legacy_windows=False)
    monkeypatch.setattr(terminal, "console", lambda: console)
    return stream


def test_a_bar_for_what_lasts(screen):
    whole, part = Work("export"), Work("model.safetensors", 4, "tensors")
    part.reach(1)
    look = Bar()
    look(activity.current(), whole.began + 0.1)
    assert screen.getvalue() == ""
    look(activity.current(), whole.began + 10)
    assert "model.safetensors, 1 of 4 tensors" in screen.getvalue()
    assert "0:30 left" in screen.getvalue()
    look((), whole.began + 11)
    assert screen.getvalue().endswith("\x1b[2K"), "its line is removed"


def test_no_bar_beside_that_of_training(screen, monkeypatch):
    whole = Work("train")
    look = Bar()
    look((whole,), whole.began + 10)
    monkeypatch.setattr(terminal, "_claimed", True)
    look((whole,), whole.began + 11)
    drawn = screen.getvalue()
    assert drawn.endswith("\x1b[2K")
    look((whole,), whole.began + 12)
    assert screen.getvalue() == drawn


def test_an_error_is_told_below_no_bar(screen, capsys):
    whole, look = Work("export"), Bar()
    look((whole,), whole.began + 10)
    terminal.show_error("export: out: stands there already")
    assert screen.getvalue().endswith("\x1b[2K")
    assert "stands there" in capsys.readouterr().err


def test_lines_do_not_get_into_what_a_command_prints(capsys, monkeypatch):
    monkeypatch.setattr(display.log, "isEnabledFor", lambda level: False)
    say("working")
    out, err = capsys.readouterr()
    assert out == ""
    assert re.fullmatch(r"\d\d:\d\d:\d\d  working\n", err)


def test_a_run_says_them_in_its_log(caplog, capsys):
    with caplog.at_level(logging.INFO):
        say("training, 3 of 8 steps")
    assert "training, 3 of 8 steps" in caplog.text
    assert capsys.readouterr().err == "", "the log says it, and nothing else"


def test_the_thread_looks_until_the_end(monkeypatch):
    looked = []
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LOOKS", 0.01)
    monkeypatch.setattr(Lines, "__call__", lambda self, works, now: looked.append(works))
    with shown("plan"):
        until(lambda: looked, 30, "the thread looks")
        assert [str(work) for work in activity.current()] == ["plan"]
    count = len(looked)
    assert activity.current() == ()
    assert len(looked) == count
