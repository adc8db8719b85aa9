import json

import pytest

from fd_large.engine import time_box
from fd_large.engine.time_box import DECIDED_EVERY, TimeBox


@pytest.fixture
def clock(monkeypatch):
    now = {"t": 0.0}
    monkeypatch.setattr(time_box.time, "monotonic", lambda: now["t"])
    return now


def train(box, clock, each, *, first=0, until=10**9, evaluate_every=0):
    """Makes steps of `each(step)` seconds up to the box's end; returns the totals by step."""
    totals, done = {}, first
    while done < min(box.total, until):
        done += 1
        clock["t"] += each(done)
        totals[done] = box.after_step(done, evaluate_every)
        if evaluate_every and done % evaluate_every == 0:
            clock["t"] += 4.0
            box.after_evaluation(4.0)
    return totals


def test_the_length_fits_the_seconds_evaluations_included(clock, tmp_path):
    box = TimeBox(240.0, tmp_path, 10_000)
    clock["t"] += 4.0
    box.after_evaluation(4.0)
    totals = train(box, clock, lambda step: 2.5 if step < 4 else 0.5, evaluate_every=50)
    assert totals[DECIDED_EVERY - 1] == 10_000
    assert totals[DECIDED_EVERY] < 480
    assert 215 < clock["t"] + 2 * 4.0 <= 240


@pytest.mark.parametrize("factor", [3.0, 1 / 3])
def test_a_machine_that_slows_or_speeds_up_keeps_the_time(clock, tmp_path, factor):
    box = TimeBox(240.0, tmp_path, 10_000)
    totals = train(box, clock, lambda step: 0.4 * (factor if step > 150 else 1))
    assert 0.9 * 240 < clock["t"] <= 240
    first = totals[DECIDED_EVERY]
    assert (totals[max(totals)] < first) == (factor > 1)
    changed = [step for step in totals if step > 1 and totals[step] != totals[step - 1]]
    assert changed
    assert all(step % DECIDED_EVERY == 0 for step in changed)


def test_a_steady_machine_is_left_alone(clock, tmp_path):
    totals = train(TimeBox(240.0, tmp_path, 10_000), clock, lambda step: 0.5 + 0.01 * (step % 2))
    assert len(set(totals.values())) == 2, "the recipe's length, and one decision"


def test_at_most_what_the_recipe_allows_and_at_least_what_was_done(clock, tmp_path):
    assert max(train(TimeBox(240.0, tmp_path, 100), clock, lambda step: 0.1)) == 100
    assert max(train(TimeBox(5.0, tmp_path, 100), clock, lambda step: 1.0)) == DECIDED_EVERY


def test_a_run_that_goes_on_makes_the_same_decisions_and_spends_what_is_left(clock, tmp_path):
    def each(step):
        return 0.4 if step <= 150 else 1.2

    box = TimeBox(240.0, tmp_path, 10_000)
    begun = train(box, clock, each, until=150)
    stored = json.loads(json.dumps(box.state()))
    used = clock["t"]
    begun |= train(box, clock, each, first=150, until=230)
    assert begun[230] < begun[150], "corrected after the checkpoint"

    clock["t"] += 5000.0  # Time between the two starts counts for nothing.
    again = TimeBox(240.0, tmp_path, 10_000, first=150, stored=stored)
    assert again.total == begun[150]
    begin = clock["t"]
    # On another machine: the same steps have the same lengths, whatever it takes.
    replayed = train(again, clock, lambda step: 0.1, first=150, until=200)
    assert replayed == {step: begun[step] for step in replayed}
    train(again, clock, lambda step: 0.5, first=200)
    assert 0.9 * 240 < used + clock["t"] - begin <= 240


@pytest.mark.parametrize("text", [None, "{", '{"decisions": 3}', '{"decisions": [{"step": 20}]}'])
def test_without_its_file_a_run_goes_on_by_its_checkpoint(clock, tmp_path, text):
    if text is not None:
        (tmp_path / "time_box.json").write_text(text)
    stored = {"seconds": 100.0, "decisions": [{"step": 20, "updates": 400}]}
    box = TimeBox(240.0, tmp_path, 1000, first=250, stored=stored)
    assert box.total == 400
    train(box, clock, lambda step: 0.9, first=250)
    assert 130 - DECIDED_EVERY < clock["t"] <= 140


def test_a_file_of_another_training_is_not_believed(clock, tmp_path):
    rows = [{"step": 20, "updates": 90}, {"step": 260, "updates": 270}]
    (tmp_path / "time_box.json").write_text(json.dumps({"updates": 270, "decisions": rows}))
    stored = {"seconds": 100.0, "decisions": [{"step": 20, "updates": 400}]}
    box = TimeBox(240.0, tmp_path, 1000, first=250, stored=stored)
    assert train(box, clock, lambda step: 0.9, first=250, until=260)[260] == 400


def test_a_run_of_the_first_release_keeps_its_length(clock, tmp_path):
    (tmp_path / "time_box.json").write_text('{"updates": 300, "seconds_per_update": 0.8}')
    box = TimeBox(240.0, tmp_path, 1000, first=50)
    assert max(train(box, clock, lambda step: 9.0, first=50)) == 300


def test_a_run_that_starts_over_measures_anew(clock, tmp_path):
    train(TimeBox(240.0, tmp_path, 10_000), clock, lambda step: 0.5, until=100)
    assert TimeBox(240.0, tmp_path, 10_000).total == 10_000
