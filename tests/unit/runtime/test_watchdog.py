"""The watchdog: what counts as a standstill, and what is left of a rank that met one."""

import json
import logging
import multiprocessing
import signal
import threading
import time

import pytest
from waiting import until

from fd_large.data.slow_images import at_image
from fd_large.errors import ConfigError
from fd_large.ranks import distributed
from fd_large.recipes.sections import Runtime
from fd_large.runtime import watchdog as module
from fd_large.runtime.hooks import Update
from fd_large.runtime.watchdog import Silence, Watchdog


@pytest.fixture
def make_dog(make_setting, monkeypatch, tmp_path):
    """A started watchdog of 0.2 s and the event that its end sets."""
    monkeypatch.setattr(module, "MOST_SECONDS_OF_LINGERING", 0.0)
    dogs = []

    def make(seconds=0.2, first=0, start_seconds=0.2, owned=True, begins=True):
        left = []
        ended = threading.Event()
        dog = Watchdog(
            seconds,
            tmp_path,
            lambda: owned,
            start="this",
            start_seconds=max(seconds, start_seconds),
            leave=lambda code: (left.append(code), ended.set()),
        )
        dog.start()
        if begins:
            dog.on_start(make_setting(first=first))
        dogs.append(dog)
        return dog, left, ended

    yield make
    for dog in dogs:
        dog.on_end("done")


def test_silence_lasts_from_the_last_beat_on() -> None:
    silence = Silence(interval=1.0, now=100.0)
    assert [silence.lasts(100.0 + t, 0, limit=10.0) for t in range(1, 11)] == [False] * 10
    assert not silence.lasts(111.0, 1, limit=10.0)
    found = [silence.lasts(111.0 + t, 1, limit=10.0) for t in range(1, 11)]
    assert found == [False] * 9 + [True]
    assert silence.seconds == 10.0


def test_time_in_which_nobody_looked_does_not_count() -> None:
    """A process that was stopped for an hour was no more silent than its looks were late."""
    silence = Silence(interval=1.0, now=0.0)
    assert not silence.lasts(1.0, 5, limit=10.0)
    assert not silence.lasts(3601.0, 5, limit=10.0)
    assert silence.seconds == 2.0


def test_a_standstill_leaves_stacks_a_status_and_75(make_dog, tmp_path, caplog, capfd) -> None:
    (tmp_path / "summary.json").write_text('{"updates": 3, "status": "preempted"}')
    dog, left, ended = make_dog(first=3)
    dog.beat()
    dog.after_update(Update(3, 0, 1.0, 1.0, 1e-3))
    assert ended.wait(60)
    assert left == [75]
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "updates": 3,
        "status": "hung",
        "start": "this",
    }
    said = sorted(r.getMessage() for r in caplog.records if r.levelno == logging.ERROR)
    stacks, line, waits = said
    assert waits == "watchdog: rank 0 waits for no collective"
    assert "rank 0" in line
    assert "has not moved for 0 s, after step 4 of 10" in line
    assert "its training thread is in" in line
    assert "thread MainThread" in stacks
    assert "test_a_standstill_leaves_stacks_a_status_and_75" in stacks
    assert "test_a_standstill_leaves_stacks_a_status_and_75" in capfd.readouterr().err


def test_a_start_may_take_longer_than_a_step_and_is_watched_too(make_dog, tmp_path, caplog) -> None:
    dog, left, ended = make_dog(seconds=0.1, start_seconds=600.0, begins=False)
    assert not ended.wait(0.5)
    # Collectives count as moving, and so does a block that is compiled.
    before = distributed.moves()
    distributed.moved()
    assert distributed.moves() == before + 1
    dog.after_update(Update(0, 0, 1.0, 1.0, 1e-3))
    assert ended.wait(60)
    caplog.clear()
    # Hung while models are built; the folder may still be another's.
    _, left, ended = make_dog(seconds=0.1, start_seconds=0.3, begins=False, owned=False)
    assert ended.wait(60)
    assert left == [75]
    assert "before its first step" in caplog.text
    assert json.loads((tmp_path / "summary.json").read_text()) == {
        "status": "hung",
        "start": "this",
    }


@pytest.mark.parametrize(
    ("seconds", "start"), [(8.0, 60.0), (100.0, 300.0), (600.0, 1750.0), (1799.0, 1799.0)]
)
def test_the_limit_of_a_start_stays_below_that_of_collectives(seconds, start, tmp_path) -> None:
    assert Watchdog(seconds, tmp_path, bool)._start_limit == start


def loads_for_ever() -> None:
    time.sleep(600)


def test_loading_processes_write_their_stacks_too_and_end(make_dog, monkeypatch, capfd) -> None:
    kill_workers = module.kill_workers
    monkeypatch.setattr(module, "kill_workers", lambda: None)  # for as long as it takes to write
    _, _, ended = make_dog(seconds=2.0)
    child = multiprocessing.get_context("fork").Process(target=loads_for_ever)
    child.start()
    try:
        assert ended.wait(60)
        said = []

        def told() -> bool:
            said.append(capfd.readouterr().err)
            return "in loads_for_ever" in "".join(said)

        until(told, 60, lambda: "".join(said))
        kill_workers()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
    finally:
        child.kill()
        child.join()


def test_a_log_that_hangs_does_not_hold_the_end_up(make_dog, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(module, "SECONDS_FOR_LAST_WORDS", 2.0)
    going = threading.Event()

    class Stuck(logging.Handler):
        def emit(self, record):
            going.wait()

    stuck = Stuck()
    logging.getLogger().addHandler(stuck)
    try:
        _, left, ended = make_dog()
        assert ended.wait(60)
        assert left == [75]
        assert json.loads((tmp_path / "summary.json").read_text()) == {
            "status": "hung",
            "start": "this",
        }
    finally:
        going.set()
        logging.getLogger().removeHandler(stuck)


def test_every_kind_of_progress_counts_and_the_end_stops_the_clock(make_dog) -> None:
    dog, left, _ = make_dog(seconds=600.0)
    update = Update(0, 0, 1.0, 1.0, 1e-3)
    counts = [dog._beats]
    for move in (
        dog.beat,
        lambda: dog.after_update(update),
        lambda: dog.on_skip(update, None),
        lambda: dog.on_roll_back(update, 0),
        lambda: dog.on_evaluation(1, {}),
        lambda: dog.on_save(1),
        lambda: dog.on_saved(1.0),
    ):
        move()
        counts.append(dog._beats)
    assert counts == list(range(1, 9))
    dog.on_end("done")
    assert not dog._thread.is_alive()
    assert not left


def test_a_save_that_may_be_taken_for_a_standstill_is_told(make_dog, caplog) -> None:
    dog, _, _ = make_dog(seconds=600.0)
    dog.on_saved(299.0)
    assert "a save took" not in caplog.text
    dog.on_saved(301.0)
    assert "a save took 301 s" in caplog.text


@pytest.mark.parametrize("seconds", [-1.0, 1800.0])
def test_seconds_out_of_range_are_refused(seconds) -> None:
    with pytest.raises(ConfigError, match=r"runtime\.watchdog_seconds"):
        Runtime(watchdog_seconds=seconds)


def reads_for_ever() -> None:
    with at_image(1, 3, lambda index: f"/data/{index}.jpg"):
        time.sleep(600)


def test_the_image_that_a_loading_process_waits_for_is_named_before_the_end(
    make_dog, caplog
) -> None:
    _, left, ended = make_dog(seconds=2.0, start_seconds=2.0)
    child = multiprocessing.get_context("fork").Process(target=reads_for_ever)
    child.start()
    try:
        until(lambda: "/data/3.jpg" in caplog.text, 60, lambda: caplog.text)
        named_after = [r.levelname for r in caplog.records if "/data/3.jpg" in r.getMessage()]
        assert named_after[0] == "WARNING"
        assert ended.wait(60)
        assert left == [75]
        (last,) = [r for r in caplog.records if "has not moved for" in r.getMessage()]
        assert "/data/3.jpg" in last.getMessage()
    finally:
        child.kill()
        child.join()
