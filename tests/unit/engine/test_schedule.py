import math

import pytest

from fd_large.engine.schedule import SCHEDULES, CosineSchedule

SCHEDULE = CosineSchedule(peak=1.2e-3, warmup_start=2e-6, minimum=2e-5, total=200, warmup=20)


def test_first_updates_lag_by_one_and_the_last_never_reaches_the_minimum():
    rates = [SCHEDULE.at_step(u) for u in range(200)]
    assert rates[:4] == pytest.approx([2e-6, 2e-6, 6.19e-5, 1.218e-4], rel=1e-12)
    assert rates[199] == pytest.approx(2.03594120587e-5, rel=1e-11)
    assert max(rates) == 1.2e-3


def test_no_warm_up_and_past_the_end():
    flat = CosineSchedule(peak=1.0, warmup_start=0.0, minimum=0.1, total=10, warmup=0)
    assert flat.at_step(0) == 1.0
    assert flat.scaled_at(0, 0.5) == 0.5
    assert flat.value(10) == flat.value(99) == 0.1


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        # One step late; the last one is 88 of 90 steps after warm-up.
        ("cosine", {0: 1e-3, 11: 1.0, 99: 0.1 + 0.45 * (1 + math.cos(math.pi * 88 / 90))}),
        # 1 - 0.9 * step / 100 after warm-up.
        ("linear", {0: 1e-3, 10: 0.91, 55: 0.505, 99: 0.109}),
        ("linear_after_warmup", {0: 1e-3, 9: 1.0, 10: 1.0, 99: 0.1}),
        # As long down as up, then its end.
        (
            "rise_and_fall",
            {0: 1e-3 + 0.999 * 0.1**0.9, 9: 1.0, 14: 1 - 0.9 * 0.5**0.9, 19: 0.1, 99: 0.1},
        ),
    ],
)
def test_every_schedule_rises_to_its_peak_and_falls_to_its_end(name, expected):
    schedule = SCHEDULES[name](1.0, 1e-3, 0.1, 100, 10)
    rates = [schedule.at_step(step) for step in range(100)]
    assert {step: rates[step] for step in expected} == pytest.approx(expected, rel=1e-12)
    assert rates[:10] == sorted(rates[:10])
    assert rates[11:] == sorted(rates[11:], reverse=True)


def test_every_schedule_of_the_table_is_tested():
    assert SCHEDULES.keys() == {
        *("cosine", "linear", "linear_after_warmup", "rise_and_fall", "steps"),
    }


def test_steps_fall_to_a_tenth_after_their_shares_of_the_run():
    steps = SCHEDULES["steps"](1.0, 1e-3, 0.02, 100, 10, drops=(0.75, 0.9))
    rates = [steps.at_step(step) for step in (0, 5, 10, 74, 75, 89, 90, 99)]
    assert rates == pytest.approx([1e-3, 0.5005, 1, 1, 0.1, 0.1, 0.02, 0.02])
    assert steps.scaled_at(75, 0.5) == pytest.approx(0.05)


def test_the_line_over_all_steps_has_the_warm_up_multiplied_into_it():
    line = SCHEDULES["linear"](1.0, 0.0, 0.0, 100, 10)
    assert line.at_step(5) == pytest.approx(0.95 * 0.5)
    assert line.at_step(10) == pytest.approx(0.9)
    later = SCHEDULES["linear_after_warmup"](1.0, 0.0, 0.0, 100, 10)
    assert later.at_step(10) == 1.0
    assert later.scaled_at(10, 0.5) == 0.5
