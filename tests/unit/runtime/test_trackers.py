"""Trackers by name, a user's own among them, and one that fails."""

from __future__ import annotations

import logging

import pytest

from fd_large import doors
from fd_large.errors import ConfigError
from fd_large.recipes.sections import Runtime
from fd_large.runtime.hooks import Tracker
from fd_large.runtime.tensorboard import TensorBoard
from fd_large.runtime.trackers import Trackers, trackers_of

OWN = """
from fd_large.runtime.hooks import Tracker

class Csv(Tracker):
    pass

class Other:
    pass

class Needy(Tracker):
    def __init__(self, path):
        pass
"""


@pytest.fixture
def own(tmp_path):
    (tmp_path / "own.py").write_text(OWN)
    doors.allow(tmp_path / "own.py")
    return lambda name: f"module:{tmp_path}/own.py:{name}"


def test_a_recipe_names_them_in_order(own, tmp_path, monkeypatch):
    assert [type(t) for t in trackers_of(Runtime().trackers)] == [TensorBoard]
    names = [type(t).__name__ for t in trackers_of((own("Csv"), "tensorboard"))]
    assert names == ["Csv", "TensorBoard"]
    assert trackers_of(()) == []
    monkeypatch.chdir(tmp_path)
    assert Runtime(trackers=("module:own.py:Csv",)).trackers == (own("Csv"),)


@pytest.mark.parametrize(
    ("name", "part"), [("Other", "Other"), ("Needy", "TypeError"), ("Cvs", "nearest: Csv")]
)
def test_what_is_no_tracker_is_refused(own, name, part):
    with pytest.raises(ConfigError, match=r"runtime\.trackers") as caught:
        trackers_of([own(name)])
    assert part in str(caught.value)


def test_one_that_fails_is_left_out_and_the_others_go_on(caplog):
    class Broken(Tracker):
        def on_end(self, status):
            raise OSError("no room")

    told = []

    class Seen(Tracker):
        def on_end(self, status):
            told.append(status)

    trackers = Trackers([Broken(), Seen()])
    with caplog.at_level(logging.INFO):
        trackers.tell("on_end", "done")
        trackers.tell("on_end", "again")
    assert told == ["done", "again"]
    (told, details) = caplog.records
    assert told.message == "tracker Broken FAILED in on_end and is not used any more: no room"
    assert details.exc_info
    assert details.file_only, "one line for the user, the stack for the log"
