import pytest

from fd_large.engine import time_box
from fd_large.engine.time_box import MEASURED_STEPS, TimeBox


@pytest.fixture
def clock(monkeypatch):
    now = {"t": 0.0}
    monkeypatch.setattr(time_box.time, "monotonic", lambda: now["t"])
    return now


def _run(box, clock, each, evaluate_every=0):
    for number in range(MEASURED_STEPS):
        clock["t"] += each * (5 if number < 3 else 1)  # The first ones are slow.
        total = box.after_step(evaluate_every)
    return total


def test_the_length_fits_the_seconds_evaluations_included(clock, tmp_path):
    box = TimeBox(240.0, tmp_path, 10_000)
    clock["t"] += 4.0
    box.after_evaluation(4.0)
    total = _run(box, clock, 0.5, evaluate_every=50)
    left = total - MEASURED_STEPS
    end = clock["t"] + 0.5 * left + 4.0 * left / 50 + 3 * 4.0
    assert 225 < end <= 240
    assert TimeBox(240.0, tmp_path, 10_000).decided() == total, "kept for a resumed run"


def test_at_most_what_the_recipe_allows_and_at_least_what_was_done(clock, tmp_path):
    assert _run(TimeBox(240.0, tmp_path, 100), clock, 0.1) == 100
    assert _run(TimeBox(5.0, tmp_path, 100), clock, 1.0) == MEASURED_STEPS


def test_a_run_that_goes_on_counts_from_where_it_is(clock, tmp_path):
    assert _run(TimeBox(5.0, tmp_path, 100, first=15), clock, 1.0) == 15 + MEASURED_STEPS


def test_a_damaged_note_is_measured_again(clock, tmp_path):
    (tmp_path / "time_box.json").write_text("{")
    assert TimeBox(240.0, tmp_path, 100).decided() is None
