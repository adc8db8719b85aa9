"""The canary: who is named, when the run ends, and what is not saved."""

import math
import re

import pytest
import torch

from fd_large.runtime.hooks import Update, Verdict
from fd_large.tasks.distillation import canary as module
from fd_large.tasks.distillation.canary import (
    CHECKS_BETWEEN_NAMINGS,
    Canary,
    _odd_holders,
    seconds_of_product,
)

STOP = Verdict(stop="teacher changed")


class Ranks:
    """Three ranks of which the test is rank 0: what each would answer."""

    def __init__(self):
        self.shards = ["1/1 aa"] * 3
        self.wrong = [False] * 3
        self.far = [0.0] * 3
        self.seconds = [1.0] * 3
        self.map = torch.ones(2, 4, 8)
        self.looks = 0

    def gather(self, value):
        if isinstance(value, float):
            return self.seconds
        if isinstance(value[0], str):
            return [(shard, f"n{rank}", "cuda:7") for rank, shard in enumerate(self.shards)]
        self.looks += 1
        return [value, *zip(self.wrong[1:], self.far[1:], strict=True)]


@pytest.fixture
def ranks(monkeypatch):
    found = Ranks()
    monkeypatch.setattr(module.distributed, "gather_objects", found.gather)
    return found


@pytest.fixture
def start(ranks, make_setting):
    def begin(every=4, first=0, total=100):
        canary = Canary(
            every,
            shard_of=lambda: ranks.shards[0],
            map_of=lambda: ranks.map,
            seconds=lambda: 1.0,
        )
        canary.on_start(make_setting(first=first, total=total))
        return canary

    return begin


def after(canary, done):
    return canary.after_update(Update(done - 1, 0, 1.0, 1.0, 1e-3))


def test_looks_every_so_many_updates_after_the_last_and_before_a_checkpoint(start, ranks):
    canary = start(every=4, total=10)
    looked = []
    for done in range(1, 11):
        before = ranks.looks
        assert after(canary, done) is None
        if done in (3, 4, 10):
            canary.on_save(done)
        looked += [done] * (ranks.looks - before)
    assert looked == [3, 4, 8, 10]
    canary.on_end("done")


def test_a_rank_whose_part_changed_is_named_and_all_stop(start, ranks, caplog):
    canary = start()
    assert after(canary, 4) is None
    ranks.wrong[2] = True
    assert after(canary, 7) is None
    assert after(canary, 8) == STOP
    [said] = caplog.messages
    assert re.search(r"step 4, .*step 8, .*rank 2 \(n2, cuda:7\): .*bits", said)


def test_own_part_and_own_map_are_compared_with_those_of_the_start(start, ranks):
    canary = start()
    ranks.shards[0] = "1/1 bb"
    assert after(canary, 4) == STOP
    ranks.shards[0] = "1/1 aa"
    canary = start()
    ranks.map = ranks.map + 0.1
    assert after(canary, 4) == STOP


def test_a_map_of_zeros_has_not_changed(start, ranks):
    ranks.map = torch.zeros(2, 4, 8)
    canary = start()
    assert after(canary, 4) is None
    ranks.map = ranks.map + 1e-3
    assert after(canary, 8) == STOP


@pytest.mark.parametrize("far", [0.02, math.nan, math.inf])
def test_a_rank_that_maps_otherwise_is_named(start, ranks, caplog, far):
    canary = start()
    ranks.far[1] = 0.005
    assert after(canary, 4) is None
    ranks.far[1] = far
    assert after(canary, 8) == STOP
    assert "rank 1 (n1, cuda:7): " in caplog.text


def test_no_checkpoint_is_written_that_learned_from_a_changed_teacher(start, ranks, caplog):
    canary = start()
    after(canary, 4)
    assert canary.on_save(4) is None
    ranks.wrong[1] = True
    assert canary.on_save(6) == STOP
    assert "without saving later steps" in caplog.text
    assert canary.on_save(6) == STOP
    assert sum("THE TEACHER CHANGED" in said for said in caplog.messages) == 1


def test_ranks_that_hold_the_same_part_are_compared_at_the_start(start, ranks, caplog):
    ranks.shards[1] = "1/1 bb"
    assert after(start(), 1) == STOP
    assert "NOT THE SAME ON ALL RANKS at the start: rank 1 (n1, cuda:7)" in caplog.text


@pytest.mark.parametrize(
    ("shards", "odd"),
    [
        (["1/2 a", "2/2 b"], []),
        (["1/2 a", "2/2 b", "1/2 a", "2/2 b"], []),
        (["1/2 a", "2/2 b", "1/2 a", "2/2 c"], [1, 3]),
        (["1/1 a", "1/1 a", "1/1 c"], [2]),
    ],
)
def test_of_many_holders_the_odd_one_is_found_of_two_both(shards, odd):
    assert _odd_holders(shards) == odd


def test_a_slow_rank_is_named_after_two_checks_and_then_only_now_and_then(start, ranks, caplog):
    canary = start(every=1)
    slow_in = {2, 5, 6, *range(8, 8 + CHECKS_BETWEEN_NAMINGS)}
    named = []
    for done in range(1, 8 + CHECKS_BETWEEN_NAMINGS):
        ranks.seconds = [1.0, 1.6 if done in slow_in else 1.4, 1.0]
        caplog.clear()
        assert after(canary, done) is None
        named += [done] * len(caplog.messages)
        assert not caplog.messages or "rank 1 (n1, cuda:7) is slow" in caplog.text
    assert named == [6, 6 + CHECKS_BETWEEN_NAMINGS]


def test_one_of_two_ranks_can_be_slow(start, ranks, caplog):
    canary = start(every=1)
    ranks.seconds = [1.0, 1.6]
    after(canary, 1)
    after(canary, 2)
    assert "rank 1" in caplog.text


def test_the_product_takes_time():
    assert seconds_of_product() > 0
