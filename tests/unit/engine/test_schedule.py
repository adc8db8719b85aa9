import pytest

from fd_large.engine.schedule import CosineSchedule, official_accumulated_rate

SCHEDULE = CosineSchedule(peak=1.2e-3, warmup_start=2e-6, minimum=2e-5, total=200, warmup=20)


def test_first_updates_lag_by_one_and_the_last_never_reaches_the_minimum():
    rates = [SCHEDULE.at_update(u) for u in range(200)]
    assert rates[:4] == pytest.approx([2e-6, 2e-6, 6.19e-5, 1.218e-4], rel=1e-12)
    assert rates[199] == pytest.approx(2.03594120587e-5, rel=1e-11)
    assert max(rates) == 1.2e-3


def test_official_accumulated_rate_counts_micro_batches():
    rates = [
        official_accumulated_rate(SCHEDULE, u, accumulation=4, micro_batches_per_epoch=20)
        for u in range(50)
    ]
    assert rates[:4] == pytest.approx([2e-6, 1.817e-4, 4.213e-4, 6.609e-4], rel=1e-12)
    assert rates[49] == pytest.approx(2.22451281259e-5, rel=1e-11)


def test_no_warm_up_and_past_the_end():
    flat = CosineSchedule(peak=1.0, warmup_start=0.0, minimum=0.1, total=10, warmup=0)
    assert flat.at_update(0) == 1.0
    assert flat.value(10) == flat.value(99) == 0.1
