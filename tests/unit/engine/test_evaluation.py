"""When evaluations are due, and the mode that they are made in."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from fd_large.engine.evaluation import Evaluation, Interrupted, evaluating, steps_between


@pytest.mark.parametrize(
    ("every", "due"), [(0, [0, 12]), (5, [0, 5, 10, 12]), (6, [0, 6, 12]), (20, [0, 12])]
)
def test_start_and_end_are_always_due(every, due):
    evaluation = Evaluation(lambda *_: ({}, None), every)
    assert [step for step in range(13) if evaluation.due(step, last=step == 12)] == due


@pytest.mark.parametrize(
    ("every", "between"), [([], 0), ([0, 0], 0), ([6, 4], 2), ([0, 5], 5), ([3, 7, 0], 1)]
)
def test_the_loop_stops_wherever_one_may_be_due(every, between):
    assert steps_between([Evaluation(lambda *_: ({}, None), n) for n in every]) == between


@pytest.mark.parametrize("error", [None, Interrupted, ValueError])
def test_training_goes_on_after_it_whatever_happened(error):
    task = nn.Dropout()
    engine = SimpleNamespace(task=task.train())
    with pytest.raises(error) if error else nullcontext(), evaluating(engine):
        assert not task.training
        assert not torch.is_grad_enabled()
        if error:
            raise error
    assert task.training
    assert torch.is_grad_enabled()
