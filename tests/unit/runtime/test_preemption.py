"""Reasons to stop, as one rank notices them."""

from __future__ import annotations

import logging
import os
import signal

import pytest

from fd_large.runtime import preemption
from fd_large.runtime.hooks import Wish
from fd_large.runtime.preemption import Preemption

STOP = Wish(stop=True)


@pytest.fixture(autouse=True)
def handlers():
    """The test process gets its own back."""
    before = {number: signal.getsignal(number) for number in preemption.SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def started(make_setting):
    def start(checkpoint_bytes=1000, notice_seconds=120.0):
        hook = Preemption(notice_seconds)
        hook.on_start(make_setting(checkpoint_bytes=checkpoint_bytes))
        return hook

    return start


@pytest.mark.parametrize("number", preemption.SIGNALS)
def test_a_signal_is_kept_until_it_is_asked_for_also_one_before_the_start(number, make_setting):
    hook = Preemption(120.0)
    os.kill(os.getpid(), number)
    hook.on_start(make_setting())
    assert hook.wish() == STOP
    assert hook.wish() == STOP


def test_the_file_is_found_obeyed_and_removed(started, tmp_path, monkeypatch):
    monkeypatch.setattr(preemption, "SECONDS_BETWEEN_LOOKS", 0.0)
    hook = started()
    assert hook.wish() == Wish()
    (tmp_path / preemption.STOP_FILE).touch()
    assert hook.wish() == STOP
    hook.on_end("preempted")
    assert not (tmp_path / preemption.STOP_FILE).exists()
    assert not list(tmp_path.glob(".write_probe*"))


def test_it_leaves_room_for_the_slowest_save_before_the_job_ends(started, monkeypatch):
    now = 1_000_000.0
    monkeypatch.setattr(preemption.time, "time", lambda: now)
    monkeypatch.setenv("SLURM_JOB_END_TIME", str(int(now) + 100))
    hook = started()
    assert hook.wish() == Wish()
    now += 60
    hook.on_saved(10.0)
    assert hook.wish() == Wish(), "40 s are left, 25 are needed"
    hook.on_saved(30.0)
    assert hook.wish() == STOP, "40 s are left, 45 are needed"


def test_it_says_at_the_start_whether_a_save_fits(started, caplog):
    caplog.set_level(logging.INFO)
    started(notice_seconds=60.0)
    assert "the notice is 60 s" in caplog.text
    assert "DOES NOT FIT" not in caplog.text
    # 10^15 bytes take more than a minute on any disk.
    started(checkpoint_bytes=10**15, notice_seconds=60.0)
    assert "A SAVE DOES NOT FIT" in caplog.text
    assert "--signal=B:USR1@" in caplog.text
