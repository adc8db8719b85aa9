"""A task in its DeepSpeed engine: its weights are exact, whatever the stage and the precision."""

from __future__ import annotations

import pytest
import torch
from unit.engine.conftest import CONFIGS, Brightness, batch_of

from fd_large.engine.forward_backward import forward_backward
from fd_large.engine.zero import partition, state


def masters(engine):
    return {
        key.removeprefix("master."): value.flatten().clone()
        for key, value in state.shards(engine)
        if key.startswith("master.")
    }


def alone(seed=0):
    return partition.build(Brightness, {}, partitioned=False, seed=seed)


@pytest.mark.parametrize("config", CONFIGS)
def test_random_weights_follow_the_seed_alone(make_engine, config):
    engine = make_engine(config, seed=3)
    assert engine.stage == CONFIGS[config][0]
    found = masters(engine)
    for name, parameter in alone(3).named_parameters():
        assert torch.equal(found[name], parameter.detach().flatten()), name
    other = dict(alone(4).named_parameters())
    assert not torch.equal(found["head.weight"], other["head.weight"].detach().flatten())


@pytest.mark.parametrize("config", CONFIGS)
def test_given_weights_are_exact_masters(make_engine, config):
    """Also those that bfloat16 cannot hold."""
    given = {name: torch.randn_like(p) for name, p in alone().student.named_parameters()}
    engine = make_engine(config, initial={"student": list(given.items())})
    found = masters(engine)
    for name, value in given.items():
        assert torch.equal(found[f"student.{name}"], value.flatten()), name
    # The head is new: as the seed draws it.
    assert torch.equal(found["head.weight"], alone().head.weight.detach().flatten())
    head = {"weight": torch.full((1, 8), 0.1), "bias": torch.full((1,), 0.1)}
    found = masters(make_engine(config, initial={"head": list(head.items())}))
    assert all(torch.equal(found[f"head.{name}"], v.flatten()) for name, v in head.items())
    whole = {f"student.{name}": value for name, value in given.items()}
    whole |= {"head.weight": torch.ones(1, 8), "head.bias": torch.ones(1)}
    again = masters(make_engine(config, initial={"": list(whole.items())}))
    assert all(torch.equal(again[name], value.flatten()) for name, value in whole.items())


@pytest.mark.parametrize(("every", "wrapped"), [(1, 2), (2, 1)])
def test_checkpointed_blocks_give_the_same_step(make_engine, every, wrapped, caplog):
    caplog.set_level("DEBUG")
    losses = []
    for options in ({}, {"activation_checkpointing": "every", "checkpoint_every": every}):
        engine = make_engine("whole", **options)
        for number in range(2):
            losses.append(forward_backward(engine, batch_of(number), seed=0).item())
            engine.deepspeed.step()
    assert losses[:2] == losses[2:]
    assert f"activation checkpointing: {wrapped} of 2 blocks" in caplog.text
