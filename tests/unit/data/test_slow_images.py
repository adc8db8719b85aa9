"""The image that a process hangs at is seen from the process that forked it."""

from __future__ import annotations

import multiprocessing
import time

import pytest
from waiting import until

from fd_large.data import slow_images
from fd_large.data.slow_images import at_image, longer_than, watch
from fd_large.errors import DataError


@pytest.fixture(autouse=True)
def as_before(monkeypatch):
    monkeypatch.setattr(slow_images, "_shared", None)


def hang(slot, name):
    with at_image(slot, 7, name):
        time.sleep(600)


def refuse(index):
    raise DataError(f"no name for {index}")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        (lambda index: f"/data/{index}.jpg", "/data/7.jpg"),
        (lambda index: "é" * 5000, "é" * 507),
        (refuse, "image 7 of the listing"),
        (None, "image 7 of the listing"),
    ],
)
def test_the_parent_sees_what_a_child_is_at(name, told):
    watch()
    process = multiprocessing.get_context("fork").Process(target=hang, args=(3, name))
    process.start()
    try:
        until(lambda: longer_than(0.01), 60, "nothing was seen")
        ((seconds, seen),) = longer_than(0.01)
        assert seconds > 0.01
        assert seen == told
        assert longer_than(500) == []
    finally:
        process.kill()
        process.join()


def test_what_is_over_is_not_seen():
    watch()
    with at_image(0, 1), at_image(1, 2):
        assert [name[:7] for _, name in longer_than(-1)] == ["image 1", "image 2"]
    assert longer_than(-1) == []


def test_without_a_watch_nothing_is_noted():
    with at_image(0, 1, refuse):
        assert longer_than(-1) == []
