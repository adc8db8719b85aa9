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
from fd_large.errors import CheckpointError, NotFiniteError
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
    with pytest.raises(CheckpointError, match=r"--fresh"):
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
    with pytest.raises(CheckpointError, match=r"2 .*\(head\.bias, head\.weight"):
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


@pytest.mark.parametrize(
    ("times", "stored", "level"),
    [(7, 0, logging.DEBUG), (6, 0, logging.WARNING), (6, 1, logging.DEBUG)],
)
def test_a_disk_that_is_too_small_is_a_warning(make, monkeypatch, caplog, times, stored, level):
    """For 7 checkpoints, of which those of an earlier start have their room."""
    checkpoints = make(keep_last=2, keep_every=5)
    for step in range(1, stored + 1):
        checkpoints.save(step)
        checkpoints.settle()
    free = times * checkpoints.bytes
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=free))
    caplog.set_level(logging.DEBUG)
    checkpoints.log_disk_use(20)
    (record,) = (r for r in caplog.records if r.getMessage().startswith("checkpoints:"))
    assert record.levelno == level
    assert "up to 7 at a time" in record.getMessage()
    assert ("DO NOT FIT" in record.getMessage()) == (level == logging.WARNING)


def break_state(checkpoints, kind, value=torch.nan):
    """Puts a number that is not finite into the state; returns the piece's key."""
    pieces = state.shards(checkpoints._engine)
    key, values = next(piece for piece in pieces if piece.key.startswith(f"{kind}."))
    values.view(-1)[0] = value
    return key


def saved_unchecked(checkpoints, monkeypatch, *steps):
    """Saves as a version did that asked nothing."""
    with monkeypatch.context() as patch:
        patch.setattr(state, "not_finite", lambda engine: [])
        for step in steps:
            checkpoints.save(step)
            assert checkpoints.settle()


def updates_of(folder):
    return [one.update for one in store.complete(folder)]


@pytest.mark.parametrize("config", ["whole", "flat", "sharded", "disk"])
@pytest.mark.parametrize("kind", ["master", "exp_avg_sq", "ema"])
def test_a_state_that_is_not_finite_becomes_no_checkpoint_and_removes_none(
    make, make_engine, tmp_path, caplog, config, kind
):
    checkpoints = make(engine=make_engine(config), average=True, keep_last=1, max_failed_saves=1)
    expected = saved(checkpoints, 1)
    key = break_state(checkpoints, kind, torch.inf)
    checkpoints.save(2)
    assert checkpoints.flags[2]
    assert not checkpoints.settle()
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == [store.name_of(1)]
    assert f"{kind} of {key.partition('.')[2]} is not finite" in caplog.text
    assert checkpoints.roll_back(2) == 1
    assert not checkpoints.flags[2]
    assert same(state_of(checkpoints), expected)
    checkpoints.save(3)
    assert checkpoints.settle()
    assert updates_of(tmp_path) == [3]


def test_a_save_that_removes_no_older_ones(make, tmp_path):
    checkpoints = make(keep_last=1)
    saved(checkpoints, 1)
    checkpoints.save(2, prunes=False)
    checkpoints.settle()
    assert updates_of(tmp_path) == [1, 2]
    saved(checkpoints, 3)
    assert updates_of(tmp_path) == [3]


@pytest.mark.parametrize("kind", ["master", "exp_avg", "ema"])
def test_stored_states_that_are_not_finite_are_passed_over_and_set_aside(
    make, tmp_path, monkeypatch, caplog, kind
):
    writer = make(average=True)
    expected = saved(writer, 1)
    key = break_state(writer, kind)
    saved_unchecked(writer, monkeypatch, 2, 3)
    assert updates_of(tmp_path) == [1, 2, 3]
    rolled = make(average=True)
    assert rolled.roll_back(2) == 1
    assert same(state_of(rolled), expected)
    assert updates_of(tmp_path) == [1, 3], "a newer one is none of a roll-back's business"
    resumed = make(average=True)
    assert resumed.resume() == 1
    assert same(state_of(resumed), expected)
    names = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    # Among the newest that stay they would drive out the sound ones.
    assert names == {store.name_of(1), *(f"damaged_{store.name_of(step)}" for step in (2, 3))}
    for step in (2, 3):
        broken = f"{store.name_of(step)}: {kind} of {key.partition('.')[2]} is not finite"
        assert broken in caplog.text


def test_where_no_stored_state_is_finite_somebody_has_to_look(make, tmp_path, monkeypatch):
    writer = make()
    advance(writer, 1)
    key = break_state(writer, "exp_avg")
    saved_unchecked(writer, monkeypatch, 2, 3)
    assert make().roll_back(3) is None
    with pytest.raises(NotFiniteError) as caught:
        make().resume()
    assert caught.value.exit_code == 3
    for told in (store.name_of(2), store.name_of(3), key.partition(".")[2], "exp_avg", "--fresh"):
        assert told in str(caught.value)
    assert updates_of(tmp_path) == [2, 3], "nothing is set aside where nothing is taken"
