"""When a run saves, what it resumes from, and what it refuses."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from unit.engine.conftest import Brightness, batch_of

from fd_large import doors
from fd_large.checkpoint import read, store
from fd_large.engine.checkpoints import Checkpoints
from fd_large.engine.ema import Ema
from fd_large.engine.forward_backward import forward_backward
from fd_large.engine.zero import state
from fd_large.engine.zero.optimizer import set_learning_rate
from fd_large.errors import CheckpointError
from fd_large.recipes.sections import Optim, Runtime


@pytest.fixture
def make(make_engine, tmp_path, monkeypatch):
    # A file that is missing is waited for.
    monkeypatch.setattr(read, "SECONDS_BETWEEN_TRIES", 0.0)

    def checkpoints(
        *, pictures="all", check_stored=lambda manifest: None, average=False, engine=None, **runtime
    ):
        engine = engine or make_engine()
        if average:
            Ema(engine, 0.5)
        return Checkpoints(
            tmp_path,
            engine,
            runtime=Runtime(**{"keep_last": 9, **runtime}),
            global_batch_size=8,
            facts={"pictures": pictures, "teacher": "hash"},
            check_stored=check_stored,
        )

    return checkpoints


def advance(checkpoints, steps):
    engine = checkpoints._engine
    for number in range(steps):
        set_learning_rate(engine.deepspeed.optimizer, 1e-2)
        forward_backward(engine, batch_of(number), seed=0)
        engine.deepspeed.step()
    checkpoints.optimizer_steps += steps


def saved(checkpoints, *steps):
    """Saves after each of these steps, a step of the optimiser apart; returns the last state."""
    for step in steps:
        advance(checkpoints, 1)
        checkpoints.save(step)
        assert checkpoints.settle()
    return state_of(checkpoints)


def state_of(checkpoints):
    return {key: values.clone() for key, values in state.shards(checkpoints._engine)}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


@pytest.mark.parametrize(("save_every", "due"), [(0, [5, 10]), (4, [4, 8, 12])])
def test_due_at_the_ends_of_epochs_or_every_so_many_steps(make, save_every, due):
    checkpoints = make(save_every=save_every)
    assert [step for step in range(1, 13) if checkpoints.due(step, 5)] == due


def test_a_resume_takes_the_newest_sound_one(make, tmp_path, caplog):
    first = make()
    state_of_two = saved(first, 2)
    saved(first, 3)
    (tmp_path / "checkpoints" / store.name_of(3) / store.file_of(0)).write_bytes(b"torn")
    second = make()
    assert second.resume() == 2
    assert "DAMAGED CHECKPOINT" in caplog.text
    assert same(state_of(second), state_of_two)
    assert second.optimizer_steps == 1
    assert second.evaluated
    assert make(average=True).resume() == 2


def test_state_on_a_disk_is_saved_to_the_end_at_once_and_without_a_copy(
    make, make_engine, tmp_path
):
    checkpoints = make(engine=make_engine("disk"))
    advance(checkpoints, 2)
    assert checkpoints.save(2) > 0
    assert [item.update for item in store.complete(tmp_path)] == [2]
    assert checkpoints._saver._buffer.nbytes == 0
    expected = state_of(checkpoints)
    advance(checkpoints, 1)
    assert checkpoints.after_update(busy_anywhere=False, failed_anywhere=False) is None
    assert checkpoints.resume() == 2
    assert same(state_of(checkpoints), expected)


def test_nothing_to_resume_and_nothing_sound(make, tmp_path):
    assert make().resume() == 0
    saved(make(), 2)
    (tmp_path / "checkpoints" / store.name_of(2) / store.file_of(0)).unlink()
    with pytest.raises(CheckpointError, match=r"no checkpoint is sound.*--fresh"):
        make().resume()


def test_a_manifest_says_what_it_is_of(make, tmp_path):
    checkpoints = make(average=True)
    advance(checkpoints, 3)
    checkpoints.save(4, evaluated=False)
    checkpoints.settle()
    manifest = json.loads(
        (tmp_path / "checkpoints" / store.name_of(4) / "manifest.json").read_text()
    )
    expected = {
        "update": 4,
        "optimizer_steps": 3,
        "evaluated": False,
        "ema": True,
        "samples": 32,
        "world_size": 1,
        "zero_stage": 0,
        "pictures": "all",
        "teacher": "hash",
    }
    assert expected.items() <= manifest.items()
    elements = sum(p.numel() for p in checkpoints._engine.task.parameters())
    assert checkpoints.bytes == 16 * elements
    again = make()
    assert again.resume() == 4
    assert not again.evaluated
    assert again.bytes == 12 * elements


def test_one_step_is_saved_once_and_the_oldest_go(make, tmp_path):
    checkpoints = make(keep_last=2)
    saved(checkpoints, 1, 2, 3)
    assert checkpoints.save(3) is None
    assert not checkpoints.flags[0]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == [store.name_of(2), store.name_of(3)]


def test_a_roll_back_takes_the_newest_of_at_most_so_many_steps(make):
    checkpoints = make()
    earlier = saved(checkpoints, 1, 4)
    saved(checkpoints, 6)
    assert checkpoints.roll_back(0) is None
    assert checkpoints.roll_back(5) == 4
    assert same(state_of(checkpoints), earlier)
    assert checkpoints.optimizer_steps == 2


class Wider(Brightness):
    def __init__(self):
        super().__init__()
        self.head = torch.nn.Linear(8, 2)


def test_another_model_another_training_and_other_images(make, make_engine, caplog):
    saved(make(), 1)
    with pytest.raises(CheckpointError, match=r"2 tensors that differ \(head\.bias, head\.weight"):
        make(engine=make_engine(make_task=Wider)).resume()

    def refuse(manifest):
        raise CheckpointError(f"not of {manifest['teacher']}")

    with pytest.raises(CheckpointError, match="not of hash"):
        make(check_stored=refuse).resume()
    assert make(pictures="fewer").resume() == 1
    assert "data.root: NOT THE IMAGES" in caplog.text


def test_another_optimiser_is_refused_by_what_it_keeps(make, make_engine, tmp_path):
    path = tmp_path / "own.py"
    path.write_text(
        "import torch\n"
        "def sgd(groups, lr):\n    return torch.optim.SGD(groups, lr=lr, momentum=0.9)\n"
    )
    doors.allow(path)
    own = Optim(name=f"module:{path}:sgd")
    saved(make(engine=make_engine(optim=own)), 1)
    assert make(engine=make_engine(optim=own)).resume() == 1
    with pytest.raises(CheckpointError, match=r"momentum_buffer.*exp_avg, exp_avg_sq"):
        make().resume()


def test_failed_saves_in_a_row_end_the_run(make, monkeypatch):
    def full(*_):
        raise OSError("no space left")

    monkeypatch.setattr("fd_large.checkpoint.tensor_file.write", full)
    checkpoints = make(max_failed_saves=2)
    checkpoints.save(1)
    assert not checkpoints.settle()
    checkpoints.save(1)
    with pytest.raises(CheckpointError, match=r"runtime\.max_failed_saves.*got 2") as caught:
        checkpoints.settle()
    assert caught.value.agreed


@pytest.mark.parametrize(("free", "level"), [(1e12, logging.DEBUG), (10, logging.WARNING)])
def test_a_disk_that_is_too_small_is_a_warning(make, monkeypatch, caplog, free, level):
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    caplog.set_level(logging.DEBUG)
    make(keep_last=2, keep_every=5).log_disk_use(20)
    (record,) = (r for r in caplog.records if r.getMessage().startswith("checkpoints:"))
    assert record.levelno == level
    assert "up to 7 at a time" in record.getMessage()
