"""The best evaluation, and when to stop."""

from __future__ import annotations

import json
import math

import pytest

from fd_large.engine.best import Best
from fd_large.errors import ConfigError
from fd_large.recipes.task_kind import check_metric


def noted(values, **more):
    best = Best("m", **{"lower_is_better": True, **more})
    return best, [best.note(step, {"m": value}, all_made=True) for step, value in values.items()]


def test_less_or_more_is_better_and_of_equals_the_first():
    values = {1: 3.0, 2: 1.0, 3: 1.0, 4: 4.0}
    least, improved = noted(values)
    assert (least.step, improved) == (2, [True, True, False, False])
    most, improved = noted(values, lower_is_better=False)
    assert (most.step, improved) == (4, [True, False, False, True])


def test_what_is_not_finite_is_never_the_best():
    best, improved = noted({1: math.nan, 2: math.inf, 3: 5.0, 4: -math.inf})
    assert (best.step, improved) == (3, [False, False, True, False])
    assert best.to_dict() == {"metric": "m", "value": 5.0, "update": 3}
    never, _ = noted({1: math.nan, 2: math.nan}, patience=2)
    assert never.exhausted
    assert never.to_dict() is None


def test_patience_counts_evaluations_since_the_best():
    best, _ = noted({2: 1.0, 4: 2.0, 6: 3.0}, patience=3)
    assert not best.exhausted
    best.note(8, {}, all_made=False)
    assert not best.exhausted, "an evaluation without the number does not count"
    best.note(10, {"m": 1.0}, all_made=False)
    assert best.exhausted
    assert "1 at step 2" in best.reason()
    best.note(12, {"m": 0.5}, all_made=False)
    assert not best.exhausted
    assert not noted({2: 1.0, 4: 2.0, 6: 3.0})[0].exhausted, "0 turns it off"


def test_before_the_first_step_there_is_nothing_to_keep():
    best, improved = noted({0: 1.0, 1: 2.0})
    assert (best.step, improved) == (1, [False, True])


def test_a_run_that_goes_on_knows_what_was_evaluated_until_there(tmp_path):
    rows = [{"update": step, "m": value} for step, value in enumerate((0.0, 3.0, 1.0, 2.0))]
    rows.insert(2, {"update": 1, "other": 1.0})
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "evaluations.jsonl").write_text(text)
    settings = {"metric": "m", "lower_is_better": True, "patience": 1}
    assert Best.of_folder(tmp_path, 1, **settings).step == 1
    assert Best.of_folder(tmp_path, 2, **settings).step == 2
    assert Best.of_folder(tmp_path, 3, **settings).exhausted
    assert Best.of_folder(tmp_path / "none", 3, **settings).step is None


def test_a_metric_is_a_name_on_disk():
    known = {"loss": "x", "held_out/loss": "x", "held_out/best_constant": "x"}
    check_metric("held_out_loss", known)
    for wrong in ("loss", "held_out/loss", "held_out_best_constant"):
        with pytest.raises(ConfigError, match=r"eval\.best_metric.*: held_out_loss"):
            check_metric(wrong, known)
