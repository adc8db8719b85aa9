"""The loop: which steps are made, who is asked when, and how a run ends and goes on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from unit.engine.conftest import batch_of

from fd_large.checkpoint import store
from fd_large.engine.best import Best
from fd_large.engine.checkpoints import Checkpoints
from fd_large.engine.ema import Ema
from fd_large.engine.evaluation import Evaluation
from fd_large.engine.loop import Trainer, TrainingPlan
from fd_large.engine.schedule import CosineSchedule
from fd_large.engine.students import train_together
from fd_large.engine.zero import state
from fd_large.errors import DataError
from fd_large.recipes.sections import Guard as Limits
from fd_large.recipes.sections import Runtime
from fd_large.runtime.guard import Guard
from fd_large.runtime.hooks import Hook, Verdict, Wish

PER_EPOCH = 4


class Recorder(Hook):
    """Notes what happens; answers what the test wants: by step, or by number of finished steps."""

    def __init__(self, judge=None, wish=None, after=None, on_save=None):
        self.notes, self.updates, self.evidence = [], [], []
        self.verdicts, self.wishes = judge or {}, wish or {}
        self.afterwards, self.saving = after or {}, on_save or {}

    def on_start(self, setting):
        self.finished = setting.first_update

    def wish(self):
        return self.wishes.get(self.finished, Wish())

    def judge(self, update):
        return self.verdicts.get(update.index)

    def on_skip(self, update, evidence):
        self.evidence.append(evidence)

    def on_roll_back(self, update, restored):
        self.notes.append(f"back to {restored}")

    def after_update(self, update):
        self.updates.append(update)
        self.finished = update.index + 1
        return self.afterwards.get(self.finished)

    def on_save(self, index):
        self.notes.append(f"save {index}")
        return self.saving.get(index)

    def on_evaluation(self, index, metrics):
        self.notes.append(f"evaluated {index}: {metrics}")

    def on_stop(self):
        self.notes.append("all know")

    def on_end(self, status):
        self.notes.append(status)


class Run:
    """One process's part of a run of `total` steps; another one in the same folder goes on."""

    def __init__(
        self,
        make_engine,
        setting,
        folder,
        *,
        total=10,
        accumulation=1,
        save_every=4,
        evaluate_every=0,
        average=False,
        config="whole",
        **answers,
    ):
        self.engine = make_engine(config, seed=3, accumulation=accumulation)
        ema = Ema(self.engine, 0.5) if average else None
        self.checkpoints = Checkpoints(
            folder,
            self.engine,
            runtime=Runtime(save_every=save_every, keep_last=9),
            global_batch_size=2 * accumulation,
            facts={"pictures": "all"},
            check_stored=lambda manifest: None,
        )
        first = self.checkpoints.resume()
        self.hook = Recorder(**answers)
        self.measured = []
        plan = TrainingPlan(
            CosineSchedule(1e-2, 1e-3, 0.0, total, 2), PER_EPOCH, accumulation, seed=5
        )
        self.trainer = Trainer(
            self.engine,
            plan,
            [self.hook],
            setting(first=first, total=total),
            checkpoints=self.checkpoints,
            evaluations=[Evaluation(self.measure, evaluate_every)] if evaluate_every else (),
            ema=ema,
        )
        self.accumulation = accumulation

    def measure(self, step, last, between):
        between()
        self.measured.append((step, last))
        return {"loss": 0.5}, None

    def batches(self, epoch, first_step):
        for number in range(first_step, PER_EPOCH):
            for part in range(self.accumulation):
                number_of_all = (epoch * PER_EPOCH + number) * self.accumulation + part
                yield batch_of(number_of_all)

    def train(self):
        (status,) = train_together([self.trainer], self.batches)
        self.state = {key: values.clone() for key, values in state.shards(self.engine)}
        return status


@pytest.fixture
def start(make_engine, make_setting, tmp_path):
    return lambda **more: Run(make_engine, make_setting, tmp_path, **more)


def indices(run, **wanted):
    return [u.index for u in run.hook.updates if all(getattr(u, k) == v for k, v in wanted.items())]


def test_a_run_makes_its_steps_saves_and_evaluates(start, tmp_path):
    run = start(evaluate_every=3)
    assert run.train() == "done"
    assert indices(run) == list(range(10))
    assert [u.epoch for u in run.hook.updates] == [0] * 4 + [1] * 4 + [2] * 2
    assert [u.learning_rate for u in run.hook.updates[:3]] == pytest.approx([1e-3, 1e-3, 5.5e-3])
    assert run.hook.updates[-1].loss < run.hook.updates[0].loss
    assert run.measured == [(0, False), (3, False), (6, False), (9, False), (10, True)]
    seen = [note for note in run.hook.notes if not note.startswith("evaluated")]
    assert seen == ["save 4", "save 8", "save 10", "done"]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == [
        f"step_{step:08d}" for step in (4, 8, 10)
    ]


@pytest.mark.parametrize("config", ["whole", "sharded"])
def test_a_run_in_two_parts_is_the_run_in_one_to_the_bit(start, tmp_path, config):
    settings = {"accumulation": 2, "average": True, "config": config}
    whole = start(save_every=99, **settings)
    assert whole.train() == "done"
    for path in (tmp_path / "checkpoints").iterdir():
        path.rename(tmp_path / "aside")
    first = start(wish={5: Wish(stop=True)}, **settings)
    assert first.train() == "preempted"
    assert indices(first) == list(range(6)), "the step that runs when the wish is agreed is kept"
    second = start(**settings)
    assert second.train() == "done"
    losses = [u.loss for run in (first, second) for u in run.hook.updates]
    assert losses == [u.loss for u in whole.hook.updates]
    assert second.state.keys() == whole.state.keys()
    assert all(torch.equal(second.state[key], value) for key, value in whole.state.items())


def test_a_wish_to_save_is_granted_after_the_step(start):
    run = start(wish={2: Wish(save=True)})
    run.train()
    assert [note for note in run.hook.notes if "save" in note][:2] == ["save 3", "save 4"]


def test_a_refused_step_moves_nothing_leaves_evidence_and_delays_a_save(start):
    run = start(total=5, judge={3: Verdict(skip=True)})
    assert run.train() == "done"
    assert indices(run, skipped=True) == [3]
    assert run.hook.notes == ["save 5", "done"], "due after 4, not in a row of refused steps"
    (evidence,) = run.hook.evidence
    assert torch.equal(torch.cat(list(evidence.images)), batch_of(3).images)
    assert evidence.positions.tolist() == [6, 7]
    assert evidence.losses == pytest.approx([run.hook.updates[3].loss])
    assert list(evidence.maxima)[-1] == "head"
    shorter = start(total=5, judge={3: Verdict(skip=True)})
    assert shorter.checkpoints.optimizer_steps == 4


def test_a_roll_back_goes_on_with_the_next_data(start):
    run = start(total=8, after={6: Verdict(roll_back=5)})
    assert run.train() == "done"
    assert run.hook.notes == ["save 4", "back to 4", "save 6", "save 8", "done"]
    assert indices(run) == list(range(8))
    assert run.checkpoints.optimizer_steps == 6


def test_without_a_checkpoint_to_go_back_to_the_run_ends(start, caplog):
    run = start(after={2: Verdict(roll_back=1)})
    assert run.train() == "guard"
    assert indices(run) == [0, 1]
    assert "--fresh" in caplog.text


@pytest.mark.parametrize(
    "answers", [{"after": {4: Verdict(stop="odd")}}, {"on_save": {4: Verdict(stop="odd")}}]
)
def test_a_hook_ends_a_run_without_a_checkpoint(start, tmp_path, answers):
    run = start(**answers)
    assert run.train() == "odd"
    assert indices(run) == list(range(4))
    assert not list((tmp_path / "checkpoints").glob("*"))


class Slow:
    """Numbers that are there once the run is at a step, or is waited for; notes what is done."""

    def __init__(self, run, step, ready, error=None):
        self.run, self.step, self.ready, self.error = run, step, ready, error

    @property
    def done(self):
        return len(self.run.hook.updates) >= self.ready

    def wait(self, meanwhile):
        meanwhile()
        how = "took" if self.done else "waited for"
        self.run.hook.notes.append(f"{how} {self.step} at {len(self.run.hook.updates)}")
        if self.error is not None:
            raise self.error
        return {"loss": 0.5}

    def forget(self):
        self.run.hook.notes.append(f"kept {self.step}")

    def give_up(self):
        self.run.hook.notes.append(f"gave up {self.step}")


def slow(run, *, every, ready, left=None, **more):
    """Lets a run's evaluations return numbers that are ready after some steps."""

    def measure(step, last, between):
        run.hook.notes.append(f"measured {step}")
        return Slow(run, step, ready.get(step, 99), **more), None

    def find_left(finished, again):
        run.hook.notes.append(f"left by {finished}, again {again}")
        return None if left is None else (left, Slow(run, left, 0))

    run.trainer._evaluations = [Evaluation(measure, every, find_left)]
    run.train()
    return [note for note in run.hook.notes if not note.startswith("save")]


def test_training_goes_on_while_numbers_are_worked_out(start):
    # Those of the start are ready early in step 3; those of step 4 are not by the next evaluation.
    notes = slow(start(), every=4, ready={0: 2})
    told = "evaluated {}: {{'loss': 0.5}}".format
    assert notes == [
        *("measured 0", "took 0 at 2", told(0), "kept 0"),
        *("measured 4", "waited for 4 at 8", told(4), "kept 4"),
        *("measured 8", "waited for 8 at 10", told(8), "kept 8"),
        *("measured 10", "waited for 10 at 10", told(10), "kept 10", "done"),
    ]


def test_a_run_waits_for_numbers_that_it_goes_by(start):
    run = start(total=4)
    run.trainer.best = Best("loss", lower_is_better=True, patience=9)
    notes = slow(run, every=2, ready={})
    assert [note for note in notes if "waited" in note] == [
        *("waited for 0 at 0", "waited for 2 at 2", "waited for 4 at 4")
    ]


def test_who_is_told_to_leave_does_not_wait_and_the_next_start_takes_them_up(start, tmp_path):
    notes = slow(start(wish={3: Wish(stop=True)}), every=2, ready={0: 1})
    assert notes[-4:] == ["measured 2", "all know", "preempted", "gave up 2"]
    assert evaluated(tmp_path) == {4: False}
    notes = slow(start(total=6), every=2, ready={}, left=2)
    assert notes[:5] == [
        *("left by 4, again True", "took 2 at 0", "evaluated 2: {'loss': 0.5}", "kept 2"),
        "measured 4",
    ]


def test_numbers_that_fail_end_no_training_but_the_last_ones_do(start, caplog):
    run = start(total=4)
    with pytest.raises(DataError):
        slow(run, every=2, ready={}, error=DataError("killed"))
    assert "NO RESULT of the evaluation after 2 steps: killed" in caplog.text
    assert run.hook.notes[-2:] == ["waited for 4 at 4", "gave up 4"]
    assert indices(run) == list(range(4))


def test_a_run_that_a_hook_ends_waits_for_the_numbers(start):
    run = start(after={4: Verdict(stop="odd")})
    notes = slow(run, every=3, ready={0: 1})
    assert notes[-4:] == ["waited for 3 at 4", "evaluated 3: {'loss': 0.5}", "kept 3", "odd"]


def test_a_stop_in_an_evaluation_leaves_it_to_the_next_start(start, tmp_path):
    run = start(total=4, evaluate_every=2, wish={2: Wish(stop=True)})
    run.hook.wish = lambda: Wish(stop=run.hook.finished == 2)
    assert run.train() == "preempted"
    assert run.measured == [(0, False)]
    assert run.hook.notes.count("all know") == 1
    manifest = json.loads((tmp_path / "checkpoints/step_00000002/manifest.json").read_text())
    assert manifest["evaluated"] is False
    again = start(total=4, evaluate_every=2)
    assert again.train() == "done"
    assert again.measured == [(2, False), (4, True)]


def evaluated(folder):
    """Whether each checkpoint's manifest says that its evaluation was made."""
    stored = store.complete(folder)
    return {one.update: one.manifest["evaluated"] for one in stored}


def test_what_fails_in_an_evaluation_loses_no_step_and_the_next_start_makes_up_for_it(
    start, tmp_path
):
    undisturbed = start(evaluate_every=4)
    assert undisturbed.train() == "done"
    assert evaluated(tmp_path) == {4: True, 8: True, 10: True}
    for path in (tmp_path / "checkpoints").iterdir():
        path.rename(tmp_path / path.name)

    run = start(evaluate_every=4)

    def measure(step, last, between):
        if last:
            raise OSError("the disk with the results is full")
        return {"loss": 0.5}, None

    run.measure = measure
    run.trainer._evaluations = [Evaluation(measure, 4)]
    with pytest.raises(OSError, match="is full"):
        run.train()
    assert evaluated(tmp_path) == {4: True, 8: True, 10: False}
    again = start(evaluate_every=4)
    assert again.train() == "done"
    assert again.measured == [(10, True)]
    assert indices(again) == []
    assert evaluated(tmp_path) == {4: True, 8: True, 10: True}
    assert all(torch.equal(again.state[key], value) for key, value in undisturbed.state.items())


def test_too_many_images_that_cannot_be_used_end_the_run_after_a_save(start):
    run = start()
    run.trainer._plan = run.trainer._plan._replace(max_bad_fraction=0.0, count_bad_every=2)
    run.batches = lambda *_: (replace(batch_of(n), bad=(f"{n}.png: broken",)) for n in range(4))
    with pytest.raises(DataError, match=r"data\.max_bad_fraction.*0\.png, 1\.png") as caught:
        run.train()
    assert caught.value.agreed
    assert run.hook.notes == ["save 2"]
    # Whoever starts it again has read of them.
    assert start().trainer._bad_before == (0, 0)


def test_images_that_cannot_be_used_are_counted_over_starts(start):
    def broken(run):
        run.trainer._plan = run.trainer._plan._replace(max_bad_fraction=0.003, count_bad_every=2)
        sound = run.batches
        run.batches = lambda *place: (replace(b, bad=("a.png: broken",)) for b in sound(*place))
        return run

    first = broken(start(wish={1: Wish(stop=True)}))
    assert first.train() == "preempted"
    again = broken(start())
    assert again.trainer._bad_before.num_bad == 2
    # Three of a thousand may be broken; the third and fourth come in the second start.
    with pytest.raises(DataError, match=r"got 4 of"):
        again.train()


def test_a_checkpoint_without_such_a_count_is_resumed(start, tmp_path):
    run = start(wish={1: Wish(stop=True)})
    begin = run.checkpoints._saver.begin
    dropped = {"bad_images"}
    run.checkpoints._saver.begin = lambda manifest, *rest, **more: begin(
        {name: value for name, value in manifest.items() if name not in dropped}, *rest, **more
    )
    run.train()
    (manifest,) = tmp_path.rglob("manifest.json")
    assert "bad_images" not in json.loads(manifest.read_text())
    assert start().trainer._bad_before == (0, 0)


def test_a_failed_save_is_said_by_the_status(start, monkeypatch):
    run = start(total=2, save_every=2)
    monkeypatch.setattr(run.checkpoints, "settle", lambda: False)
    assert run.train() == "not saved"


class Breaks(Hook):
    """Puts NaN into a tensor of a kind after some of the steps."""

    def __init__(self, run, kind, *steps):
        self.run, self.kind, self.steps, self.named = run, kind, steps, ""

    def after_update(self, update):
        if update.index + 1 in self.steps:
            pieces = state.shards(self.run.engine)
            key, values = next(p for p in pieces if p.key.startswith(f"{self.kind}."))
            values.view(-1)[0] = torch.nan
            self.named = key.partition(".")[2]


def guarded(run, *more, **limits):
    """Lets the guard watch a run, first of all."""
    run.trainer._hooks = [Guard(Limits(**limits)), *run.trainer._hooks, *more]
    return run


def stored_states(folder):
    """Whether each checkpoint holds finite numbers alone."""
    return {
        one.update: all(
            values.isfinite().all()
            for path in one.path.glob("*.safetensors")
            for values in load_file(path).values()
        )
        for one in store.complete(folder)
    }


@pytest.mark.parametrize("config", ["whole", "sharded", "disk"])
@pytest.mark.parametrize("kind", ["master", "exp_avg", "exp_avg_sq", "ema"])
def test_a_broken_state_is_never_stored_and_the_run_goes_back_by_itself(
    start, tmp_path, config, kind
):
    run = start(config=config, average=True)
    breaks = Breaks(run, kind, 8)
    assert guarded(run, breaks).train() == "done"
    assert stored_states(tmp_path) == {4: True, 9: True, 10: True}
    assert indices(run, skipped=True) == [8], "what follows a state that is lost is lost"
    assert [note for note in run.hook.notes if note.startswith("back")] == ["back to 4"]
    incident = json.loads((tmp_path / "incidents/update_00000009/incident.json").read_text())
    assert incident["state_not_finite"] == [{"rank": 0, "kind": kind, "tensor": breaks.named}]
    assert incident["restored"] == 4
    assert run.checkpoints.optimizer_steps == 5


def test_a_broken_state_without_a_guard_ends_the_run_and_a_start_goes_on(start, tmp_path):
    run = start(average=True)
    run.trainer._hooks.append(Breaks(run, "ema", 8))
    assert run.train() == "guard"
    assert stored_states(tmp_path) == {4: True}
    again = start(average=True)
    assert again.hook is not run.hook
    assert again.train() == "done"
    assert indices(again) == list(range(4, 10))


@pytest.mark.parametrize(
    ("step", "status", "left"), [(9, "guard", [3, 6]), (10, "not saved", [3, 6, 9])]
)
def test_a_state_that_breaks_at_the_end_leaves_the_last_steps_to_the_next_start(
    start, tmp_path, step, status, left
):
    run = start(save_every=3)
    assert guarded(run, Breaks(run, "exp_avg", step)).train() == status
    assert stored_states(tmp_path) == dict.fromkeys(left, True)
    again = start(save_every=3)
    assert guarded(again).train() == "done"
    assert indices(again) == list(range(left[-1], 10))
    assert stored_states(tmp_path)[10]


def test_a_state_that_breaks_again_and_again_ends_the_run_beside_a_sound_checkpoint(
    start, tmp_path
):
    run = start(total=40)
    assert guarded(run, Breaks(run, "master", *range(8, 40)), roll_backs=2).train() == "guard"
    assert all(stored_states(tmp_path).values())
    assert 4 in stored_states(tmp_path)


def test_where_no_step_is_accepted_a_roll_back_goes_further_back_and_removes_nothing(
    start, tmp_path
):
    run = start(total=30, save_every=2)
    run.checkpoints._saver.keep_last = 2
    # Every step after the sixth is off: the checkpoints are finite, and lead nowhere.
    run.hook.verdicts = {index: Verdict(skip=True) for index in range(6, 30)}
    assert guarded(run, skips=2, roll_backs=9).train() == "guard"
    back = [note for note in run.hook.notes if note.startswith("back")]
    assert back == ["back to 6", "back to 4"]
    assert {4, 6} <= stored_states(tmp_path).keys()
    assert indices(run)[-1] == 11


def test_a_stop_in_a_row_of_refused_steps_removes_no_checkpoint(start, tmp_path):
    run = start(total=9, save_every=4, judge={4: Verdict(skip=True)}, wish={4: Wish(stop=True)})
    run.checkpoints._saver.keep_last = 1
    assert run.train() == "preempted"
    assert list(stored_states(tmp_path)) == [4, 5]
