import pytest

from fd_large.engine.schedule import CosineSchedule

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
