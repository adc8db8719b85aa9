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


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_schedule_rises_to_its_peak_and_falls_to_its_end(name):
    schedule = SCHEDULES[name](1.0, 1e-3, 0.1, 100, 10)
    rates = [schedule.at_step(step) for step in range(100)]
    assert rates[0] == pytest.approx(1e-3, rel=0.2)
    assert rates.index(max(rates)) in (9, 10, 11)
    assert max(rates) == pytest.approx(1.0, abs=0.1)
    assert rates[11:] == sorted(rates[11:], reverse=True)
    assert rates[-1] == pytest.approx(0.1, abs=0.02)


def test_the_line_over_all_steps_has_the_warm_up_multiplied_into_it():
    line = SCHEDULES["linear"](1.0, 0.0, 0.0, 100, 10)
    assert line.at_step(5) == pytest.approx(0.95 * 0.5)
    assert line.at_step(10) == pytest.approx(0.9)
    later = SCHEDULES["linear_after_warmup"](1.0, 0.0, 0.0, 100, 10)
    assert later.at_step(10) == 1.0
    assert later.scaled_at(10, 0.5) == 0.5
