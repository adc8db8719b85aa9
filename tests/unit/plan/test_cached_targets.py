"""When storing a teacher's maps saves time, by arithmetic."""

from __future__ import annotations

import math

import pytest

from fd_large.plan.cached_targets import CachedTargets


def cost(*, map_bytes: int, teacher: float, student: float, uses: float = 30.0) -> CachedTargets:
    """A GPU that reads 1 GB/s; seconds of an image in ms."""
    return CachedTargets(
        images=1_281_167,
        views=10,
        uses=uses,
        map_bytes=map_bytes,
        teacher_seconds=teacher / 1e3,
        student_seconds=student / 1e3,
        read_bytes_per_second=1e9,
    )


def test_a_map_that_is_read_while_the_student_computes_costs_nothing():
    # SwinV2-G at 192 px in fp16: 295 kB, 3.7 ms beside a student of 11.1 ms.
    found = cost(map_bytes=295_000, teacher=3.7, student=11.1)
    assert found.waits_seconds == 0
    assert found.saved_share == pytest.approx(3.7 * (1 - 1 / 30) / 14.8)
    assert found.fewest_uses == 1
    assert found.pays
    assert found.least_rate == pytest.approx(295_000 / 11.1e-3)
    assert found.total_bytes == 12_811_670 * 295_000


def test_a_small_teacher_of_large_maps_is_not_stored():
    # 1,769 kB in 1.77 ms against 0.5 ms of the teacher and 0.3 of the rest.
    found = cost(map_bytes=1_769_000, teacher=0.5, student=0.3)
    assert not found.pays
    assert found.saved_share < 0
    assert found.fewest_uses == math.inf
    # 800 kB are read in the 0.8 ms of a whole step.
    assert cost(map_bytes=790_000, teacher=0.5, student=0.3, uses=1000).saved_share > 0
    assert cost(map_bytes=810_000, teacher=0.5, student=0.3, uses=1000).saved_share < 0


def test_a_view_that_is_seen_once_is_not_stored():
    found = cost(map_bytes=295_000, teacher=3.7, student=11.1, uses=1.0)
    assert found.saved_share == pytest.approx(0)
    assert not found.pays


def test_from_the_fewest_uses_on_a_map_that_is_waited_for_saves_time():
    # 1.5 ms to read beside 1 ms of the student: each use saves 1.5 of the teacher's 2 ms.
    found = cost(map_bytes=1_500_000, teacher=2.0, student=1.0)
    assert found.fewest_uses == pytest.approx(2 / 1.5)
    for factor, saves in ((0.99, False), (1.01, True)):
        uses = factor * found.fewest_uses
        beside = cost(map_bytes=1_500_000, teacher=2.0, student=1.0, uses=uses)
        assert (beside.saved_share > 0) == saves
