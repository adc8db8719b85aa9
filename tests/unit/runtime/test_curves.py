"""Curves in a service: its calls are made beside training, and a failure is one warning."""

from __future__ import annotations

import json
import logging
import threading

import pytest

from fd_large.errors import ConfigError
from fd_large.runtime import curves
from fd_large.runtime.curves import RemoteCurves
from fd_large.runtime.meter import Meter


@pytest.fixture
def setting(make_setting, tmp_path):
    recipe = {"name": "made_up", "runtime": {"name": "", "tags": ["a", "b"]}, "optim": {"lr": 0.1}}
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    return make_setting


@pytest.fixture(autouse=True)
def patience(monkeypatch):
    """A loaded machine may take longer than a run waits."""
    monkeypatch.setattr(curves, "SECONDS_TO_FINISH", 600.0)


@pytest.fixture
def service(monkeypatch):
    """A class of trackers on a service that fails in the calls that `fails` names."""

    class Service(RemoteCurves):
        name = package = "json"
        fails: tuple[str, ...] = ()
        answers = threading.Event()

        def __init__(self):
            super().__init__()
            self.told = []
            self.answers.set()

        def _hear(self, *call):
            # Not the main thread, and none that a process waits for when it ends.
            assert threading.current_thread().daemon
            self.answers.wait(60)
            if call[0] in self.fails:
                raise OSError(f"no network for {call[0]}\nand more")
            self.told.append(call)

        def begin(self, setting, recipe, known):
            self._hear("begin", curves.run_name(setting, recipe), known)
            self.keep(setting, known or "id")

        def send(self, values, step):
            self._hear("send", step, sorted(values))

        def finish(self, status):
            self._hear("finish", status)

    return Service


def test_calls_come_in_order_and_a_restart_goes_on_in_the_same_run(
    setting, run_updates, service, tmp_path
):
    tracker = service()
    run_updates([Meter([tracker])], setting(), 4, evaluate=(2,))
    assert tracker.told[0] == ("begin", tmp_path.name, None)
    assert [call[1] for call in tracker.told if call[0] == "send"] == [2, 1, 2, 3, 4]
    assert tracker.told[1] == ("send", 2, ["held_out/loss"])
    assert tracker.told[-1] == ("finish", "done")
    assert json.loads((tmp_path / "trackers.json").read_text()) == {"json": "id"}
    again = service()
    run_updates([Meter([again])], setting(first=4), 5)
    assert again.told[0] == ("begin", tmp_path.name, "id")


@pytest.mark.parametrize("call", ["begin", "send", "finish"])
def test_a_service_that_fails_is_one_warning(call, setting, run_updates, service, caplog):
    tracker = service()
    tracker.fails = (call,)
    with caplog.at_level(logging.INFO):
        run_updates([Meter([tracker])], setting(), 8, evaluate=(4,))
    assert [r.message for r in caplog.records if r.levelno >= logging.WARNING] == [
        f"json gets no further points: no network for {call}"
    ]
    assert [r.file_only for r in caplog.records if r.exc_info] == [True]


def test_training_does_not_wait_for_a_service(setting, run_updates, service, monkeypatch, caplog):
    monkeypatch.setattr(curves, "SECONDS_TO_FINISH", 0.01)
    tracker = service()
    tracker.answers.clear()
    run_updates([Meter([tracker])], setting(), 8)
    assert tracker.told == []
    assert "json does not answer" in caplog.text
    tracker.answers.set()
    tracker._thread.join(60)
    assert tracker.told[-1] == ("finish", "done")


def test_what_is_not_installed_is_told_with_the_command(service, monkeypatch, tmp_path):
    class Absent(service):
        name, package = "no_such_service", "no-such-package"

    with pytest.raises(ConfigError, match="install no-such-package"):
        Absent()
    # A folder of the library's files is no library.
    (tmp_path / "no_such_service").mkdir()
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ConfigError, match="pip install"):
        Absent()
