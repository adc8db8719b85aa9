"""Several students in step: what each computes, what is done once, and how they stop and go on."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import ClassVar

import pytest
import torch
from unit.engine.conftest import Brightness
from unit.engine.test_loop import Run

from fd_large.engine.evaluation import Interrupted
from fd_large.engine.students import HooksOfAll, train_together
from fd_large.engine.zero import state
from fd_large.runtime import step_clock
from fd_large.runtime.hooks import Hook, Update, Verdict, Wish


class Taught(Brightness):
    """Learns what a frozen model says, which counts how often it is asked."""

    asked: ClassVar = Counter()

    def learnt(self, images, targets):
        if targets is not None:
            return targets
        found = images.float().mean((1, 2, 3)) / 255
        self.asked[found.sum().item()] += 1
        return found

    def prepare(self, images, targets, keep):
        wanted = self.learnt(images, targets)
        return {"pixels": images.float() / 255, "targets": wanted, "keep": keep}


@pytest.fixture
def start(make_engine, make_setting, tmp_path):
    """Returns (name of a student, how it is trained) -> its part of a run."""

    def begun(name, **more):
        def engine(*given, seed, **named):
            make_task = Taught if name == "a" else lambda: Taught(0.1)
            return make_engine(*given, make_task=make_task, seed=ord(name), **named)

        (tmp_path / name).mkdir(exist_ok=True)
        run = Run(engine, make_setting, tmp_path / name, **more)
        run.trainer.setting = replace(run.trainer.setting, folder=tmp_path / name)
        return run

    Taught.asked.clear()
    return begun


def together(*runs):
    """Trains them in step; returns their statuses."""
    read = []

    def batches(epoch, first_step):
        for batch in runs[0].batches(epoch, first_step):
            read.append(batch.positions[0].item())
            yield batch

    statuses = train_together([run.trainer for run in runs], batches)
    for run in runs:
        run.read = read
        run.state = {key: values.clone() for key, values in state.shards(run.engine)}
    return statuses


def assert_same(run, other):
    assert run.state.keys() == other.state.keys()
    for key, values in run.state.items():
        assert torch.equal(values, other.state[key]), key


@pytest.mark.parametrize("config", ["whole", "sharded"])
def test_each_computes_what_it_would_alone_and_targets_are_made_once(
    config, start, tmp_path, monkeypatch
):
    alone = []
    for name in "ab":
        alone.append(start(name, total=6, accumulation=2, config=config))
        together(alone[-1])
        (tmp_path / name).rename(tmp_path / f"{name} alone")
    Taught.asked.clear()
    both = [start(name, total=6, accumulation=2, config=config) for name in "ab"]
    assert together(*both) == ["done", "done"]
    for one, other in zip(both, alone, strict=True):
        assert_same(one, other)
    # Six steps of two micro batches.
    assert len(both[0].read) == 12
    assert set(Taught.asked.values()) == {1}
    assert len(Taught.asked) == 12


def test_whoever_is_behind_catches_up_and_all_stop_after_the_same_step(start):
    stop = {5: Wish(stop=True)}
    a = start("a", total=6, save_every=2, wish={3: Wish(stop=True)})
    assert together(a) == ["preempted"]
    a, b = start("a", total=8, save_every=2), start("b", total=8, save_every=2, wish=stop)
    assert together(a, b) == ["preempted", "preempted"]
    assert [update.index for update in a.hook.updates] == [4, 5]
    assert [update.index for update in b.hook.updates] == [0, 1, 2, 3, 4, 5]
    # Steps that it takes alone have the frozen models' pass for themselves.
    assert [update.students for update in b.hook.updates] == [1, 1, 1, 1, 2, 2]
    # The epoch that is left in the middle is read on from there.
    assert b.read == [0, 2, 4, 6, 8, 10]
    a, b = start("a", total=8, save_every=2), start("b", total=8, save_every=2)
    assert together(a, b) == ["done", "done"]
    assert [update.index for update in a.hook.updates] == [6, 7]
    assert [run.checkpoints.optimizer_steps for run in (a, b)] == [8, 8]


def test_a_student_whose_run_a_hook_ends_leaves_the_others_as_they_were(start, tmp_path):
    alone = start("b", total=6)
    together(alone)
    (tmp_path / "b").rename(tmp_path / "b alone")
    a, b = start("a", total=6, after={3: Verdict(stop="odd")}), start("b", total=6)
    assert together(a, b) == ["odd", "done"]
    assert len(a.hook.updates) == 3
    assert_same(b, alone)


def test_no_student_s_speed_has_the_evaluations_and_checkpoints_of_another(start, monkeypatch):
    real, slow, seen = [0.0], ["evaluation", "checkpoint"], Counter()

    def slowly(what):
        def wait(*_):
            real[0] += 1000.0
            seen[what] += 1

        return wait

    monkeypatch.setattr(step_clock.time, "perf_counter", lambda: real[0])
    monkeypatch.setattr(step_clock, "_stood", 0.0)
    runs = [start(name, total=2, evaluate_every=1) for name in "ab"]
    for run in runs:
        run.hook.on_evaluation, run.hook.on_save = map(slowly, slow)
    begin = step_clock.now()
    assert together(*runs) == ["done"] * 2
    assert seen == {"evaluation": 6, "checkpoint": 2}
    assert step_clock.now() == begin


def test_a_wish_that_comes_before_an_epoch_begins_is_heard_there(start):
    """A job may have much to do between epochs; nothing of the last one is lost."""
    a, b = start("a", total=8), start("b", total=8)

    def batches(epoch, first_step):
        if epoch:
            raise Interrupted
        return a.batches(epoch, first_step)

    assert train_together([run.trainer for run in (a, b)], batches) == ["preempted"] * 2
    finished = a.trainer.finished
    assert finished == b.trainer.finished == a.trainer.steps_per_epoch
    a, b = start("a", total=8), start("b", total=8)
    assert together(a, b) == ["done", "done"]
    assert a.hook.updates[0].index == b.hook.updates[0].index == finished


class Counting(Hook):
    def __init__(self):
        self.calls = Counter()
        self.updates = []

    def on_start(self, setting):
        self.setting = setting

    def beat(self):
        self.calls["beat"] += 1

    def on_end(self, status):
        self.calls[status] += 1

    def after_update(self, update):
        self.updates.append(update.index)


def test_hooks_of_all_hear_once_of_a_step_of_all(make_setting, tmp_path):
    counting = Counting()
    shared = HooksOfAll([counting])
    settings = [make_setting(first=first, total=4) for first in (2, 0)]
    shared.begin([replace(one, checkpoint_bytes=5) for one in settings], tmp_path)
    assert (counting.setting.first_update, counting.setting.total_updates) == (0, 4)
    assert (counting.setting.folder, counting.setting.checkpoint_bytes) == (tmp_path, 10)
    for index in (0, 1, 2, 2, 3, 3):
        shared.after_update(Update(index, 0, 1.0, 1.0, 1e-3))
        shared.beat()
    shared.on_save(4)
    shared.end("done")
    assert counting.updates == [0, 1, 2, 3]
    assert counting.calls == {"beat": 7, "done": 1}
