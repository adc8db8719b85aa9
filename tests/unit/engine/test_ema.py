"""The average of the weights: its formula, its place, and what an error leaves of it."""

from __future__ import annotations

import pytest
import torch
from unit.engine.conftest import CONFIGS, Brightness, batch_of

from fd_large.backbones.batch_norm import BatchNorm
from fd_large.engine.ema import Ema
from fd_large.engine.evaluation import Interrupted
from fd_large.engine.forward_backward import forward_backward
from fd_large.engine.zero import state
from fd_large.engine.zero.optimizer import set_learning_rate

DECAY = 0.75


def step(engine, number):
    set_learning_rate(engine.deepspeed.optimizer, 1e-2)
    forward_backward(engine, batch_of(number), seed=0)
    engine.deepspeed.step()


def kept(engine, kind):
    """Masters or averages, by name."""
    shards = dict(state.shards(engine))
    return {key: value.clone() for key, value in shards.items() if key.startswith(f"{kind}.")}


@pytest.mark.parametrize("config", CONFIGS)
def test_it_follows_the_weights(make_engine, config):
    engine = make_engine(config)
    ema = Ema(engine, DECAY)
    # It begins as the weights themselves.
    expected = {key.replace("master", "ema"): v for key, v in kept(engine, "master").items()}
    for number in range(3):
        step(engine, number)
        ema.update()
        for key, weights in kept(engine, "master").items():
            name = key.replace("master", "ema")
            expected[name] = DECAY * expected[name] + (1 - DECAY) * weights
    found = kept(engine, "ema")
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-6, atol=1e-7)
        assert not torch.equal(found[key], kept(engine, "master")[key.replace("ema", "master")])


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("error", [None, Interrupted])
def test_the_task_computes_with_it_inside_and_with_the_weights_after(make_engine, config, error):
    engine = make_engine(config)
    ema = Ema(engine, DECAY)
    batch = batch_of(9)

    def loss():
        engine.task.eval()
        with torch.no_grad():
            prepared = engine.task.prepare(batch.images, None, None)
            found = engine.deepspeed(**prepared)[0].item()
        engine.task.train()
        return found

    before = loss()
    step(engine, 0)
    weights, average, after = kept(engine, "master"), kept(engine, "ema"), loss()
    assert after != before
    try:
        with ema.in_place_of_weights():
            inside = loss()
            if error:
                raise error
    except Interrupted:
        assert error
    # Nothing was averaged yet: inside are the weights of the beginning.
    assert inside == before
    assert loss() == after
    for kind, was in (("master", weights), ("ema", average)):
        assert all(torch.equal(value, was[key]) for key, value in kept(engine, kind).items())


class Normed(Brightness):
    """With a batch norm of the pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = BatchNorm(3)

    def forward(self, *, pixels, targets, keep):
        pixels = self.norm(pixels.to(self.head.weight.dtype))
        return super().forward(pixels=pixels, targets=targets, keep=keep)


@pytest.mark.parametrize("config", CONFIGS)
def test_running_statistics_of_batch_norms_are_averaged_stored_and_restored(make_engine, config):
    engine = make_engine(config, make_task=Normed)
    ema, average = Ema(engine, DECAY), torch.zeros(3)
    for number in range(3):
        engine.task.before_step(0.0)
        step(engine, number)
        engine.task.after_step()
        ema.update()
        average = DECAY * average + (1 - DECAY) * engine.task.norm.running_mean
    live = engine.task.norm.running_mean.clone()
    assert not torch.allclose(live, average, rtol=0.1)
    stored = {key: value.clone() for key, value in state.shards(engine)}
    torch.testing.assert_close(stored["ema.norm.running_mean"], average)
    assert torch.equal(stored["master.norm.running_mean"], live)
    with ema.in_place_of_weights():
        torch.testing.assert_close(engine.task.norm.running_mean, average)
    assert torch.equal(engine.task.norm.running_mean, live)
    engine.averages["norm.running_mean"].zero_()
    state.restore(
        engine,
        lambda kind, name, start, stop: stored[f"{kind}.{name}"],
        finished=3,
        steps=3,
        ema=True,
    )
    state.complete(engine)
    torch.testing.assert_close(engine.averages["norm.running_mean"], average)
