"""When evaluations are due, and the mode that they are made in."""

from __future__ import annotations

from concurrent.futures import Future
from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from unit.engine.conftest import Brightness, batch_of

from fd_large.engine import evaluation
from fd_large.engine.ema import Ema
from fd_large.engine.evaluation import (
    Evaluation,
    Interrupted,
    awaited,
    evaluating,
    in_float32,
)
from fd_large.engine.memory import OutOfMemory
from fd_large.engine.zero import partition, state
from fd_large.errors import DataError


@pytest.mark.parametrize(
    ("every", "due"), [(0, [0, 12]), (5, [0, 5, 10, 12]), (6, [0, 6, 12]), (20, [0, 12])]
)
def test_start_and_end_are_always_due(every, due):
    evaluation = Evaluation(lambda *_: ({}, None), every)
    assert [step for step in range(13) if evaluation.due(step, last=step == 12)] == due


def test_ranks_wait_for_the_work_of_rank_0_in_short_turns(monkeypatch):
    monkeypatch.setattr(evaluation, "SECONDS_BETWEEN_CALLS", 0.01)
    work, calls = Future(), []

    def meanwhile():
        calls.append(1)
        if len(calls) == 3:
            work.set_result("done")

    assert awaited(work, meanwhile) == "done"
    assert len(calls) == 3
    assert awaited(None, meanwhile) is None
    failed = Future()
    failed.set_exception(DataError("killed"))
    with pytest.raises(DataError, match="killed") as caught:
        awaited(failed, meanwhile)
    assert caught.value.agreed


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


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_bfloat16_engine_is_tested_with_its_masters(make_engine, stage):
    """Those of the average where there is one; under ZeRO-3 it is tested as it trains."""
    engine = make_engine((stage, True))
    average = Ema(engine, 0.5)
    for _, owner, start, stop in state.owned(engine):
        owner.data.view(-1)[start:stop] += 1e-5  # Less than bfloat16 shows.
    images = batch_of(0).images
    plain = partition.build(Brightness, {}, partitioned=False, seed=0).eval()

    def exact(more):
        with torch.no_grad():
            for parameter, initial in zip(plain.parameters(), values, strict=True):
                parameter.copy_(initial + more)
            return plain(**plain.prepare(images, None, None))[0].item()

    values = [parameter.detach().clone() for parameter in plain.parameters()]
    with in_float32(engine, Brightness) as measured:
        found = measured(images, None)[0].item()
    with average.in_place_of_weights(), in_float32(engine, Brightness) as measured:
        averaged = measured(images, None)[0].item()
    assert engine.task.training
    if stage < 3:
        assert found == exact(1e-5)
        assert averaged == exact(0)
        assert found != averaged
    else:
        assert found != exact(1e-5)
        assert found == pytest.approx(exact(1e-5), rel=1e-2)


def test_a_copy_that_does_not_fit_is_named(make_engine):
    def make():
        raise torch.OutOfMemoryError("CUDA out of memory.")

    expected = pytest.raises(OutOfMemory, match=r"float32.*zero3\.json")
    with expected, in_float32(make_engine("flat"), make):
        pass


def test_a_float32_engine_is_tested_as_it_is(make_engine):
    engine, batch = make_engine("whole"), batch_of(0)
    engine.task.eval()
    with torch.no_grad():
        alone = engine.task(**engine.task.prepare(batch.images, None, None))[0]
    engine.task.train()
    with in_float32(engine, Brightness) as measured:
        assert torch.equal(measured(batch.images, None)[0], alone)
