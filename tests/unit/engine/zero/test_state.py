"""Masters, moments and average leave an engine as shards and come back, wherever they live."""

from __future__ import annotations

import pytest
import torch
from unit.engine.conftest import CONFIGS, Brightness, batch_of
from whole_weights import whole_weights

from fd_large.engine.ema import Ema
from fd_large.engine.forward_backward import forward_backward
from fd_large.engine.zero import partition, state
from fd_large.engine.zero.optimizer import set_learning_rate


def step(engine, number):
    set_learning_rate(engine.deepspeed.optimizer, 1e-2)
    loss = forward_backward(engine, batch_of(number), seed=0)
    engine.deepspeed.step()
    return loss.item()


def stored(engine):
    return {key: values.clone() for key, values in state.shards(engine)}


def restore(engine, shards, **counts):
    def read(kind, name, start, stop):
        return shards[f"{kind}.{name}"].view(-1)[start:stop]

    state.restore(engine, read, **counts)
    state.complete(engine)


@pytest.mark.parametrize("config", CONFIGS)
def test_an_engine_goes_on_to_the_bit_from_what_another_stored(make_engine, config):
    first = make_engine(config)
    for number in range(3):
        step(first, number)
    shards = stored(first)
    parameters = dict(first.task.named_parameters())
    assert state.layout_of(first).sizes == {
        name: getattr(p, "ds_numel", p.numel()) for name, p in parameters.items()
    }
    assert {key.partition(".")[0] for key in shards} == {"master", "exp_avg", "exp_avg_sq"}
    second = make_engine(config, seed=1)
    step(second, 7)
    restore(second, shards, finished=3, steps=3)
    assert second.deepspeed.global_steps == 3
    assert stored(second).keys() == shards.keys()
    assert all(torch.equal(value, shards[key]) for key, value in stored(second).items())
    assert [step(first, 3), step(first, 4)] == [step(second, 3), step(second, 4)]
    after = stored(first)
    assert all(torch.equal(value, after[key]) for key, value in stored(second).items())


@pytest.mark.parametrize("config", CONFIGS)
def test_shards_are_views_and_masters_are_exact(make_engine, config):
    engine = make_engine(config)
    whole = partition.build(type(engine.task), {}, partitioned=False, seed=0)
    exact = {f"master.{n}": p.detach().view(-1) for n, p in whole.named_parameters()}
    for key, values in state.shards(engine):
        if key in exact:
            assert values.dtype == torch.float32
            assert torch.equal(values.view(-1), exact[key]), key
    for _, values in state.shards(engine):
        values.fill_(0.25)
    assert all(values.eq(0.25).all() for values in stored(engine).values())


@pytest.mark.parametrize("config", CONFIGS)
def test_an_average_takes_the_place_of_the_weights_and_begins_as_they_are(make_engine, config):
    engine = make_engine(config)
    assert not state.has_average(engine)
    ema = Ema(engine, 0.5)
    assert state.has_average(engine)
    before = stored(engine)
    step(engine, 0)
    ema.update()
    after = stored(engine)
    with ema.in_place_of_weights():
        for name, value in whole_weights(engine.task):
            expected = after[f"ema.{name}"].view(value.shape)
            assert torch.equal(value, expected.to(value.dtype)), name
    assert all(torch.equal(value, after[key]) for key, value in stored(engine).items())
    # A stored state without an average: it begins as the weights.
    restore(engine, before, finished=0, steps=0)
    again = stored(engine)
    assert all(
        torch.equal(again[f"ema.{n}"], again[f"master.{n}"])
        for n, _ in engine.task.named_parameters()
    )


class Masked(Brightness):
    """Keeps running statistics, and a mask that is infinite from the start."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.full((4, 4), -torch.inf).triu(1))
        self.register_buffer("running_mean", torch.zeros(5))


@pytest.mark.parametrize("config", CONFIGS)
def test_each_tensor_of_the_state_that_is_not_finite_is_named(make_engine, config):
    engine = make_engine(config, make_task=Masked)
    Ema(engine, 0.5)
    step(engine, 0)
    assert state.not_finite(engine) == []
    pieces = {key: values for key, values in state.shards(engine) if values.numel()}
    kinds = {key.partition(".")[0] for key in pieces}
    assert kinds == {"master", "exp_avg", "exp_avg_sq", "ema"}
    bad = [torch.nan, torch.inf, -torch.inf]
    named = [key for key in pieces if key.endswith((".head.bias", ".student.norm.weight"))]
    assert len(named) == 8
    for number, key in enumerate(named):
        values, before = pieces[key].view(-1), pieces[key].clone()
        values[-1] = bad[number % 3]
        assert state.not_finite(engine) == [key]
        pieces[key].copy_(before)
    engine.task.running_mean[3] = torch.nan
    broken = ["master.running_mean", "ema.running_mean"]
    assert state.not_finite(engine) == broken
    pieces[named[0]].view(-1)[0] = torch.inf
    assert set(state.not_finite(engine)) == {named[0], *broken}


@pytest.mark.parametrize("config", ["whole", "disk"])
def test_the_look_for_what_is_not_finite_changes_no_bit(make_engine, config):
    engine = make_engine(config)
    step(engine, 0)
    before = stored(engine)
    assert state.not_finite(engine) == []
    assert all(torch.equal(value, before[key]) for key, value in stored(engine).items())
