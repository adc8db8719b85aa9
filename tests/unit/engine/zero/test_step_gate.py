"""A step that is refused leaves everything as it was."""

from __future__ import annotations

import math

import pytest
import torch
from unit.engine.conftest import CONFIGS, Brightness, batch_of

from fd_large.engine.forward_backward import forward_backward
from fd_large.engine.zero import state
from fd_large.engine.zero.optimizer import set_learning_rate
from fd_large.engine.zero.step_gate import Answer


@pytest.mark.parametrize("config", CONFIGS)
def test_a_refused_step_moves_nothing_and_the_next_one_does(make_engine, config):
    engine = make_engine(config)
    set_learning_rate(engine.deepspeed.optimizer, 1e-2)
    asked = []

    def step(answer):
        forward_backward(engine, batch_of(len(asked)), seed=0)

        def ask(norm):
            asked.append(
                float(engine.deepspeed.optimizer._global_grad_norm if norm is None else norm)
            )
            return Answer(goes_on=answer, finite=True)

        before = {key: values.clone() for key, values in state.shards(engine)}
        moved = engine.gate.step(engine.deepspeed, ask)
        after = dict(state.shards(engine))
        assert moved == answer
        return all(torch.equal(before[key], after[key]) for key in before)

    assert not step(True)
    assert step(False)
    assert not step(True)
    assert len(asked) == 3, "once per step, however many groups are stepped"
    assert all(norm > 0 for norm in asked)


class Scaled(Brightness):
    """A loss that can become NaN."""

    factor = 1.0

    def forward(self, **arguments):
        loss, values = super().forward(**arguments)
        return loss * self.factor, values


@pytest.mark.parametrize("config", CONFIGS)
def test_gradients_that_are_not_finite_move_nothing_and_leave_no_trace(make_engine, config):
    engine = make_engine(config, make_task=Scaled)
    set_learning_rate(engine.deepspeed.optimizer, 1e-2)

    def ask(norm):
        given = engine.deepspeed.optimizer._global_grad_norm if norm is None else norm
        finite = 0 <= float(given) < math.inf
        return Answer(goes_on=finite, finite=finite)

    for number, factor in enumerate([1.0, math.nan, 1.0]):
        engine.task.factor = factor
        forward_backward(engine, batch_of(number), seed=0)
        before = {key: values.clone() for key, values in state.shards(engine)}
        moved = engine.gate.step(engine.deepspeed, ask)
        after = dict(state.shards(engine))
        assert moved == math.isfinite(factor)
        assert moved != all(torch.equal(before[key], after[key]) for key in before)
        assert state.not_finite(engine) == []
