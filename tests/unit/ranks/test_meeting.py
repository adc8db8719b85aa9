"""What one rank makes for all while all go on meeting; ranks are threads here."""

from __future__ import annotations

import threading
import time

import pytest
from pretended_ranks import World

from fd_large.errors import DataError, LostRankError
from fd_large.ranks import distributed, meeting


@pytest.fixture
def world(monkeypatch):
    return World(monkeypatch, 4)


def test_one_rank_makes_what_all_get(world):
    made = []

    def check():
        def make():
            made.append(distributed.rank())
            time.sleep(0.05)
            return {"by": distributed.rank()}

        for_all = meeting.once("a", make)
        of_node = meeting.once("b", make, of_node=True)
        return for_all["by"], of_node["by"], meeting.once("a", make)["by"]

    assert world.run(lambda: meeting.meet(check)) == [(0, 0, 0), (0, 0, 0), (0, 2, 0), (0, 2, 0)]
    assert sorted(made) == [0, 0, 2]


def test_alone_or_outside_of_a_meeting_each_makes_its_own(monkeypatch):
    assert meeting.once("a", lambda: 1) == 1
    world = World(monkeypatch, 2)
    assert world.run(lambda: meeting.once("a", distributed.rank)) == [0, 1]
    world = World(monkeypatch, 1)
    assert world.run(lambda: meeting.meet(threading.current_thread)) != [None]


def test_no_rank_waits_for_what_its_maker_was_not_asked_for(world):
    def check():
        return None if distributed.is_main() else meeting.once("a", distributed.rank)

    assert world.run(lambda: meeting.meet(check)) == [None, 1, 2, 3]


def test_ranks_meet_again_and_again_while_one_works(world, monkeypatch):
    monkeypatch.setattr(meeting, "_MOST_SECONDS", 0.05)
    meetings, done = [], threading.Event()
    gather = distributed.gather_objects

    def counted(value):
        if distributed.is_main():
            meetings.append(1)
            if len(meetings) == 5:
                done.set()
        return gather(value)

    monkeypatch.setattr(distributed, "gather_objects", counted)
    # Where ranks would wait in one collective, the fifth meeting would never be.
    assert world.run(lambda: meeting.meet(lambda: meeting.once("a", lambda: done.wait(30)))) == (
        [True] * 4
    )


def test_a_large_value_goes_to_who_wants_it(world):
    def check():
        meeting.once("list", lambda: meeting.offer("list", b"x" * 1000))
        return len(meeting.fetch("list")) if distributed.rank() != 2 else 0

    assert world.run(lambda: meeting.meet(check)) == [1000, 1000, 0, 1000]


def test_a_mistake_that_one_rank_meets_for_all_is_everybodys(world):
    def check():
        def fail():
            raise DataError("data.root: no such folder")

        meeting.once("a", fail)

    for error in world.run(lambda: meeting.meet(check)):
        assert isinstance(error, DataError)
        assert str(error) == "data.root: no such folder"
        assert error.exit_code == 2


def test_a_mistake_of_one_rank_is_named_and_the_others_are_not_waited_for(world, monkeypatch):
    monkeypatch.setattr(meeting, "_GRACE_SECONDS", 0.1)
    never = threading.Event()

    def check():
        if distributed.rank() == 2:
            raise DataError("data.root: no such folder")
        if distributed.rank() == 1:
            never.wait(30)

    for error in world.run(lambda: meeting.meet(check)):
        assert str(error) == "n1: data.root: no such folder"
    never.set()


def test_a_crash_is_shown_where_it_is_and_named_elsewhere(world):
    def check():
        return 1 // (distributed.rank() - 3)

    *others, own = world.run(lambda: meeting.meet(check))
    assert isinstance(own, ZeroDivisionError)
    for error in others:
        assert isinstance(error, LostRankError)
        assert "n1: rank 3 has failed: ZeroDivisionError" in str(error)


def test_a_crash_is_said_before_it_is_raised(world, monkeypatch):
    asked, ended = threading.Event(), threading.Event()
    gather, run = distributed.gather_objects, meeting._Meeting.run

    def crash_after_the_first(value):
        states = gather(value)
        if distributed.rank() == 1 and not asked.is_set():
            asked.set()
            assert ended.wait(30)
        return states

    def noticed(self, check):
        run(self, check)
        if distributed.rank() == 1:
            ended.set()

    def check():
        if distributed.rank() == 1:
            asked.wait(30)
            raise ZeroDivisionError

    monkeypatch.setattr(distributed, "gather_objects", crash_after_the_first)
    monkeypatch.setattr(meeting._Meeting, "run", noticed)
    first, own, *others = world.run(lambda: meeting.meet(check))
    assert isinstance(own, ZeroDivisionError)
    assert all(isinstance(error, LostRankError) for error in (first, *others))


def test_one_rank_moves_while_its_check_takes_long(monkeypatch):
    world = World(monkeypatch, 1)
    monkeypatch.setattr(distributed, "SECONDS_BETWEEN_MOVES", 0.01)
    moved = threading.Event()
    monkeypatch.setattr(distributed, "moved", moved.set)
    assert world.run(lambda: meeting.meet(lambda: moved.wait(30))) == [True]
