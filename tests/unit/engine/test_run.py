"""A run of a task that only this test knows, and what the engine puts around a run."""

from __future__ import annotations

import json
import logging
import os
import signal
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import pytest
from unit.engine.conftest import Brightness, batch_of

from fd_large import doors
from fd_large.checkpoint.lease import Lease, claimed
from fd_large.data.sampler import MicroBatches
from fd_large.engine import opening
from fd_large.engine import run as engine_run
from fd_large.engine.evaluation import Evaluation
from fd_large.engine.job import Job
from fd_large.engine.run import hooks_of, train, watchdog_of
from fd_large.engine.zero import state
from fd_large.errors import CheckpointError, ConfigError, DataError, WeightsError
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture
from fd_large.runtime.hooks import Hook, Verdict, Wish


class Watched(Job):
    def hooks(self):
        return [TaskHook()]


class TaskHook(Hook):
    pass


def names(run, profile=0, more=()):
    return [type(hook).__name__ for hook in hooks_of(Watched(run), profile, more)]


def test_the_meter_is_asked_first_and_what_is_handed_over_last():
    found = names(registry.get("fd_swinv2g"), more=[Hook()])
    assert found[0] == "Meter"
    assert found[-2:] == ["TaskHook", "Hook"]
    assert {"Meter", "Guard"} <= set(found)


def test_the_watchdog_can_be_turned_off():
    run, lease = registry.get("quickstart"), Lease(Path("run"), "start")
    assert watchdog_of(run, lease) is not None
    off = replace(run.runtime, watchdog_seconds=0.0)
    assert watchdog_of(replace(run, runtime=off), lease) is None


def test_the_guard_can_be_turned_off():
    run = registry.get("quickstart")
    assert "Guard" in names(run)
    assert "Guard" not in names(replace(run, guard=replace(run.guard, enabled=False)))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_it_is_built_is_kept_and_the_run_can_go_on(
    number, recipe, tmp_path, monkeypatch
):
    before, engine_of = signal.getsignal(number), opening.engine_of

    def signalled(*given, **named):
        os.kill(os.getpid(), number)
        return engine_of(*given, **named)

    caught = replace(recipe, runtime=replace(recipe.runtime, preemption=True))
    with monkeypatch.context() as patch:
        patch.setattr(opening, "engine_of", signalled)
        assert start(caught) == 75
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["status"], summary["updates"]) == ("preempted", 0)
    if number == signal.SIGINT:
        assert signal.getsignal(number) == before, "Ctrl-C is given back"
    signal.signal(number, before)
    assert start(recipe) == 0


def test_a_hook_that_does_not_know_of_the_start_hears_of_no_failure(recipe):
    told = []

    class Noting(Hook):
        def __init__(self, *, fails=False):
            self.fails = fails

        def on_start(self, setting):
            told.append(self)
            if self.fails:
                raise ValueError("no card")

        def on_failure(self, status, reason):
            told.append(self)

    first, failing, last = hooks = [Noting(), Noting(fails=True), Noting()]
    with pytest.raises(ValueError, match="no card"):
        start(recipe, hooks=hooks)
    assert told == [first, failing, first]
    assert last not in told


def test_a_trace_only_where_it_is_asked_for():
    run = registry.get("quickstart")
    assert "Profiler" not in names(run)
    assert "Profiler" in names(run, profile=3)


class Samples(list):
    fingerprint = "names"


class BrightnessJob(Job):
    """Everything that the engine asks of a task."""

    metrics: ClassVar = {"test/loss": "test loss"}
    ignored_fields = ("eval.views",)

    def open_samples(self):
        return Samples(f"{number}.png" for number in range(10))

    def make_task(self):
        return Brightness()

    def batches(self, samples, portion):
        size = self.run.batch.global_batch_size
        for positions in MicroBatches(len(samples), portion, size):
            yield batch_of(int(positions[0]) + 10 * portion.epoch, len(positions))

    def probe_batch(self, size):
        return batch_of(0, size)

    def evaluations(self, engine, samples, micro_batch_size):
        return [Evaluation(lambda step, last, between: ({"test_loss": 1.0 / (1 + step)}, None))]

    def facts(self):
        return {"bright": True}


@pytest.fixture
def recipe(one_rank, tmp_path):
    before = list(logging.getLogger().handlers)
    run = registry.get("quickstart")
    vit = Architecture(embed_dim=8, depths=(2,), num_heads=(2,), patch_size=4)
    off = {"preemption": False, "watchdog_seconds": 0.0}
    yield replace(
        run,
        name="bright",
        student=replace(run.student, model="vit_base_patch16", architecture=vit),
        data=replace(run.data, image_size=8),
        batch=replace(run.batch, global_batch_size=4, micro_batch_size=2),
        optim=replace(run.optim, max_steps=3),
        eval=replace(run.eval, root="", views=type(run.eval)().views),
        runtime=replace(run.runtime, run_dir=str(tmp_path / "run"), **off),
    )
    for handler in set(logging.getLogger().handlers) - set(before):
        logging.getLogger().removeHandler(handler)
        handler.close()


def start(recipe, *, job=BrightnessJob, **more):
    config = "ds_configs/zero3.json"
    with claimed(Path(recipe.run_dir())) as lease:
        return train(recipe, job, deepspeed_config=config, lease=lease, **more)


def lines(folder, name):
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


class Ending(Hook):
    """Ends a run after its first step, by a wish or by a verdict."""

    def __init__(self, *, wish):
        self.by_wish, self.finished = wish, 0

    def wish(self):
        return Wish(stop=self.by_wish and self.finished > 0)

    def after_update(self, update):
        self.finished = update.index + 1
        return None if self.by_wish else Verdict(stop="odd")


def test_any_task_is_trained_to_its_end_in_two_parts(recipe, tmp_path):
    folder = tmp_path / "run"
    assert start(recipe, hooks=[Ending(wish=True)]) == 75
    assert start(recipe) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["student"] == "vit_base_patch16"
    assert (summary["status"], summary["teacher"]) == ("done", None)
    assert [row["update"] for row in lines(folder, "metrics.jsonl")] == [0, 1, 2]
    assert [row["epoch"] for row in lines(folder, "metrics.jsonl")] == [0, 0, 1]
    assert [row["test_loss"] for row in lines(folder, "evaluations.jsonl")] == [1.0, 0.25]
    manifest = json.loads((folder / "checkpoints/step_00000003/manifest.json").read_text())
    assert (manifest["bright"], manifest["pictures"], manifest["zero_stage"]) == (True, "names", 3)
    before = (folder / "summary.json").read_text()
    assert start(recipe) == 0, "nothing is left to do"
    assert (folder / "summary.json").read_text() == before


def test_a_hook_that_ends_a_run_decides_the_exit_code(recipe):
    assert start(recipe, hooks=[Ending(wish=False)]) == 3


@pytest.mark.parametrize(
    ("error", "status"),
    [(RuntimeError("no such card\nmore"), "failed"), (KeyboardInterrupt(), "interrupted")],
)
def test_a_run_that_an_error_ends_says_so_in_its_folder(
    error, status, recipe, tmp_path, monkeypatch
):
    class Failing(Hook):
        def after_update(self, update):
            if update.index == 1:
                raise error

    with pytest.raises(type(error)):
        start(recipe, hooks=[Failing()])
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["status"], summary["rank"], summary["updates"]) == (status, 0, 2)
    assert summary["reason"] == ("no such card" if status == "failed" else "KeyboardInterrupt")
    assert len(lines(tmp_path / "run", "metrics.jsonl")) == 2, "what was pending"

    # While it is built: no hook has begun.
    def fail(*_, **__):
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(opening, "engine_of", fail)
        with pytest.raises(type(error)):
            start(recipe)
    again = json.loads((tmp_path / "run/summary.json").read_text())
    assert again["status"] == status
    assert again["start"] != summary["start"]
    # A run with other settings is none of its business.
    with pytest.raises(ConfigError, match="other settings"):
        start(replace(recipe, optim=replace(recipe.optim, weight_decay=0.1)))
    assert json.loads((tmp_path / "run/summary.json").read_text()) == again


def test_a_run_whose_last_state_cannot_be_written_is_not_to_be_started_again_blindly(
    recipe, tmp_path, monkeypatch
):
    def full(*_, **__):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("fd_large.checkpoint.store.commit", full)
        assert start(recipe) == 3
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "not saved"
    assert start(recipe) == 0
    assert json.loads((tmp_path / "run/summary.json").read_text())["status"] == "done"


def steps(recipe, count):
    return replace(recipe, optim=replace(recipe.optim, max_steps=count))


def said_in(folder):
    """Lines of the run's log, without what precedes the text of each."""
    found = (folder / "logs/rank_00000.log").read_text().splitlines()
    return [line.partition("fd_large.engine.run: ")[2] for line in found]


def test_a_run_that_has_lost_its_recipe_goes_on(recipe, tmp_path):
    assert start(recipe, hooks=[Ending(wish=True)]) == 75
    (tmp_path / "run/recipe.json").unlink()
    assert start(recipe) == 0
    assert [row["update"] for row in lines(tmp_path / "run", "metrics.jsonl")] == [0, 1, 2]


def test_a_run_whose_checkpoints_are_gone_is_not_started_over(recipe, tmp_path):
    checkpoints = tmp_path / "run/checkpoints"
    assert start(recipe) == 0
    rows = (tmp_path / "run/metrics.jsonl").read_text()
    checkpoints.rename(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match=r"a finished run"):
        start(recipe)
    checkpoints.symlink_to(tmp_path / "disk")
    with pytest.raises(CheckpointError, match=r"a link to .*disk"):
        start(recipe)
    assert (tmp_path / "run/metrics.jsonl").read_text() == rows


def test_a_finished_run_goes_on_to_more_steps_and_says_what_changes(recipe, tmp_path):
    assert start(recipe) == 0
    with pytest.raises(ConfigError, match=r"optim\.max_steps 3 -> 2"):
        start(steps(recipe, 2))
    for _ in range(2):  # The second time nothing is left to do, and nothing to say.
        assert start(steps(recipe, 5)) == 0
    said = [text for text in said_in(tmp_path / "run") if "ANOTHER SCHEDULE" in text]
    assert len(said) == 1
    assert said[0].startswith("optim.max_steps 3 -> 5: ANOTHER SCHEDULE from here on: the run")
    rows = lines(tmp_path / "run", "metrics.jsonl")
    assert [row["update"] for row in rows] == [0, 1, 2, 3, 4]
    next_rate, last_rate = (f"{rows[index]['learning_rate']:.3g}" for index in (3, 2))
    assert f"next step is {next_rate} (the last step had {last_rate})" in said[0]
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert (summary["status"], summary["updates"], summary["total_updates"]) == ("done", 5, 5)


class WorseLater(BrightnessJob):
    """Evaluates after each step; the loss is least after the second one."""

    losses = (9.0, 3.0, 1.0, 2.0, 2.0, 0.5)

    def evaluations(self, engine, samples, micro_batch_size):
        def measure(step, last, between):
            between()
            return {"test_loss": self.losses[step]}, None

        return [Evaluation(measure, 1)]


def best(recipe, **values):
    wanted = replace(recipe.eval, best_metric="test_loss", **{"every": 1, **values})
    runtime = replace(recipe.runtime, keep_last=1, save_every=99)
    return replace(steps(recipe, 5), eval=wanted, runtime=runtime)


def stored(folder):
    return sorted(path.name for path in (folder / "checkpoints").iterdir())


@pytest.mark.parametrize("interrupted", [False, True])
def test_the_best_checkpoint_stays_and_a_run_without_progress_ends(interrupted, recipe, tmp_path):
    run, folder = best(recipe, patience=2), tmp_path / "run"
    if interrupted:
        assert start(run, job=WorseLater, hooks=[Ending(wish=True)]) == 75
    assert start(run, job=WorseLater) == 0
    summary = json.loads((folder / "summary.json").read_text())
    assert (summary["status"], summary["updates"]) == ("done", 4)
    assert summary["best"] == {"metric": "test_loss", "value": 1.0, "update": 2}
    assert summary["reason"].startswith("early stopping: 2 evaluations without a better test_loss")
    assert stored(folder) == ["best", "step_00000002", "step_00000004"]
    assert (folder / "checkpoints/best").resolve().name == "step_00000002"
    assert start(run, job=WorseLater) == 0
    assert f"{folder}: finished after 4 steps (early stopping" in said_in(folder)[-1]
    # More patience goes on, to what turns out to be better.
    assert start(best(recipe, patience=3), job=WorseLater) == 0
    assert stored(folder) == ["best", "step_00000002", "step_00000005"]
    assert (folder / "checkpoints/best").resolve().name == "step_00000005"


def test_a_metric_that_is_not_measured_is_refused(recipe):
    with pytest.raises(ConfigError, match=r"eval\.best_metric: .*nearest: test_loss"):
        start(replace(recipe, eval=replace(recipe.eval, best_metric="test_lose")))

    class Promised(BrightnessJob):
        metrics: ClassVar = {"test/loss": "test loss", "test/top1": "accuracy"}

    with pytest.raises(ConfigError, match="got 'test_top1'"):
        start(replace(recipe, eval=replace(recipe.eval, best_metric="test_top1")), job=Promised)


def test_what_a_job_does_before_an_epoch_shows_life_and_can_be_left(tmp_path, monkeypatch):
    class Storing:
        def batches(self, samples, portion):
            self.between_batches()
            return iter(())

    class Heard(Exception):
        pass

    def between_batches():
        raise Heard

    def train_together(trainers, batches):
        with pytest.raises(Heard):
            batches(0, 0)
        return ["done"]

    monkeypatch.setattr(engine_run, "train_together", train_together)
    shared = SimpleNamespace(begin=lambda *_: None, end=lambda _: None)
    trainer = SimpleNamespace(
        setting=SimpleNamespace(folder=tmp_path), best=None, between_batches=between_batches
    )
    opened = SimpleNamespace(job=Storing(), micro_batch_size=1, samples=None, folder=tmp_path)
    assert engine_run._train([trainer], opened, SimpleNamespace(folder=tmp_path), shared) == 0


def test_a_micro_batch_is_probed_once(recipe, tmp_path, monkeypatch):
    auto = replace(recipe, batch=replace(recipe.batch, micro_batch_size="auto"))
    assert start(auto, hooks=[Ending(wish=True)]) == 75
    assert json.loads((tmp_path / "run/micro_batch.json").read_text())["micro_batch_size"] == 4
    monkeypatch.setattr("fd_large.engine.counting.micro_batch.probe", None)
    assert start(auto) == 0


def test_a_probe_holds_the_average_too(recipe, tmp_path, monkeypatch):
    averages = []

    def probe(engines, *_, **__):
        averages.extend(map(state.has_average, engines))
        raise ConfigError("enough")

    monkeypatch.setattr("fd_large.engine.counting.micro_batch.probe", probe)
    for decay in (0.9, 0.0):
        run = replace(
            recipe,
            batch=replace(recipe.batch, micro_batch_size="auto"),
            optim=replace(recipe.optim, ema_decay=decay),
            runtime=replace(recipe.runtime, run_dir=str(tmp_path / str(decay))),
        )
        with pytest.raises(ConfigError, match="enough"):
            start(run)
    assert averages == [True, False]


def test_an_ignored_field_and_a_bad_batch_are_refused_before_anything_is_built(recipe, tmp_path):
    with pytest.raises(ConfigError, match=r"eval\.views: "):
        start(replace(recipe, eval=replace(recipe.eval, views=8)))
    with pytest.raises(ConfigError, match=r"batch\."):
        start(replace(recipe, batch=replace(recipe.batch, micro_batch_size=3)))
    assert not (tmp_path / "run").exists()


def test_weights_that_are_refused_hide_no_other_mistake(recipe, tmp_path):
    class NoSamples(BrightnessJob):
        def open_samples(self):
            raise DataError("data.root: no images")

    wrong = replace(recipe, student=replace(recipe.student, init="/no/such"))
    with claimed(tmp_path / "run") as lease, pytest.raises(WeightsError) as caught:
        train(wrong, NoSamples, deepspeed_config="gone.json", lease=lease)
    for told in ("--student.init: ", "gone.json", "data.root: "):
        assert told in str(caught.value)


def test_a_folder_allows_no_code(tmp_path, monkeypatch):
    def stop(*_, **__):
        raise ConfigError("enough")

    monkeypatch.setattr(engine_run, "open_together", stop)
    files = [tmp_path / "own.py", tmp_path / "other.py"]
    names = [f"module:{file}:it" for file in files]
    for file in files:
        file.write_text("it = 1")
    (tmp_path / "code.json").write_text(json.dumps([{"update": 0, "files": doors.hashes(names)}]))
    run = registry.get("quickstart")
    run = replace(
        run,
        objective=replace(run.objective, loss=names[0]),
        runtime=replace(run.runtime, run_dir=str(tmp_path)),
    )
    with pytest.raises(ConfigError, match="enough"):
        train(run, Job, deepspeed_config="", lease=Lease(tmp_path, "start"))
    assert [doors.is_allowed(name) for name in names] == [False, False]
