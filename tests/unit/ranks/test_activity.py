"""What a process is busy with: parts, counts and the time that is left."""

from __future__ import annotations

import pytest

from fd_large.ranks import activity
from fd_large.ranks.activity import Work, clock, counted, current, describe, work


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    monkeypatch.setattr(activity, "_works", [])
    monkeypatch.setattr(activity, "on_change", [])


def test_parts_are_told_after_the_whole_and_end_by_an_error_too():
    with work("training", 8, "steps") as whole:
        whole.reach(3)
        told = []

        def evaluate():
            with work("evaluation"):
                for _ in counted("abcd", "test images", "batches"):
                    told.append(describe(current(), whole.began + 60))
                    raise OSError("gone")

        with pytest.raises(OSError, match="gone"):
            evaluate()
        assert [str(one) for one in current()] == ["training, 3 of 8 steps"]
    assert told[0].startswith("training, 3 of 8 steps: evaluation: test images, 0 of 4 batches; ")
    assert current() == ()


def test_the_time_that_is_left_is_that_of_what_was_done_here():
    resumed = Work("training", 100, "steps", done=80)
    assert resumed.seconds_left(resumed.began + 10) is None
    resumed.reach(90)
    assert resumed.seconds_left(resumed.began + 10) == pytest.approx(10)
    assert describe((resumed,), resumed.began + 10).endswith("; 0:10 so far, 0:10 left")


def test_whoever_draws_is_called_after_each_change():
    seen = []
    activity.on_change.append(lambda: seen.append([str(one) for one in current()]))
    with work("copying", 2, "files") as copying:
        copying.advance()
    assert seen == [["copying, 0 of 2 files"], ["copying, 1 of 2 files"], []]


@pytest.mark.parametrize(
    ("total", "unit", "done", "told"),
    [
        (None, "", 0, "listing"),
        (None, "images", 12_000, "listing, 12,000 images"),
        (None, "images", 0, "listing"),
        (2.0, "", 0.5, "listing, 25%"),
        (4000, "images", 1000, "listing, 1,000 of 4,000 images"),
    ],
)
def test_words(total, unit, done, told):
    assert str(Work("listing", total, unit, done=done)) == told


@pytest.mark.parametrize(
    ("seconds", "told"),
    [
        (0.4, "0:00"),
        (7, "0:07"),
        (754, "12:34"),
        (3723, "1:02:03"),
        (3 * 86400 + 4 * 3600, "3d 04h"),
    ],
)
def test_durations(seconds, told):
    assert clock(seconds) == told
