"""The page of a run that goes on: written where it is cheap, and never a reason to stop."""

from __future__ import annotations

import json
from itertools import count

import pytest

from fd_large.engine import run_page
from fd_large.engine.run_page import RunPage
from fd_large.recipes import registry
from fd_large.runtime.meter import Meter


@pytest.fixture
def setting(make_setting, tmp_path):
    recipe = registry.get("fd_swinv2_base").to_dict()
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    return make_setting()


def test_it_takes_its_share_of_the_time_and_no_more(setting, monkeypatch):
    written, now = [], 0.0
    page = RunPage(lambda: now)
    monkeypatch.setattr(page, "_write", lambda *, running: written.append(now))
    page.on_start(setting)
    for now in (0.0, 10.0, 400.0, 600.0, 601.0, 700.0):
        page.on_evaluation(int(now), {})
    # At first as if it took five seconds, then as long as it took.
    assert written == [600.0, 601.0, 700.0]

    ticks = count(0, 50)
    page = RunPage(lambda: float(next(ticks)))
    written.clear()
    monkeypatch.setattr(page, "_write", lambda *, running: written.append(next(ticks)))
    page.on_start(setting)
    for index in range(100):
        page.on_evaluation(index, {})
    assert len(written) == 1, "it takes 100 s: the next one comes after 10,000"


@pytest.mark.parametrize(("status", "told"), [("preempted", True), ("done", False)])
def test_a_run_that_is_left_has_its_page(status, told, setting, run_updates, tmp_path):
    run_updates([Meter([RunPage()])], setting, 8, evaluate=(4,), end=status)
    assert (tmp_path / "report.html").exists() == told
    assert not told or "preempted" in (tmp_path / "report.html").read_text()


def test_a_page_that_cannot_be_written_stops_nothing(setting, run_updates, monkeypatch, caplog):
    def fail(files):
        raise OSError("no room")

    monkeypatch.setattr(run_page, "write_run_page", fail)
    run_updates([Meter([RunPage()])], setting, 8, end="preempted")
    assert "RunPage FAILED in on_end and is not used any more: no room" in caplog.text
