"""One micro batch: what it draws, its loss, and its gradient in a real engine."""

from __future__ import annotations

from dataclasses import replace

import pretended_ranks
import pytest
import torch
from unit.engine.conftest import Brightness, batch_of

from fd_large.data.loader import Batch
from fd_large.data.random_numbers import drop_path_keep
from fd_large.engine.forward_backward import (
    arguments_of_step,
    backward,
    forward_backward,
    prepared,
)


def test_drop_path_follows_seed_epoch_and_positions_alone():
    task = Brightness(drop_path_rate=0.5)
    batch = batch_of(3, size=64)
    found = prepared(task, batch, seed=4)
    expected = drop_path_keep(task.drop_path_rates, 4, batch.epoch, batch.positions)
    assert torch.equal(found["keep"], expected)
    assert 0 < found["keep"].float().mean() < 1
    # An image keeps its draws in another micro batch.
    cut = {name: getattr(batch, name)[8:24] for name in ("images", "positions", "indices")}
    part = replace(batch, **cut)
    assert torch.equal(prepared(task, part, seed=4)["keep"], expected[:, 8:24])
    assert not torch.equal(prepared(task, batch, seed=5)["keep"], expected)
    assert prepared(Brightness(drop_path_rate=0.0), batch, seed=4)["keep"] is None


def test_what_is_prepared_has_no_gradient():
    class Recording(Brightness):
        def prepare(self, images, targets, keep):
            assert not torch.is_grad_enabled()
            return super().prepare(images, targets, keep)

    prepared(Recording(), batch_of(0), seed=0)
    assert torch.is_grad_enabled()


@pytest.mark.parametrize("accumulation", [1, 2])
def test_the_loss_is_whole_and_the_gradient_is_of_the_mean(make_engine, accumulation):
    engine = make_engine("whole", accumulation=accumulation)
    alone = Brightness()
    alone.load_state_dict(engine.task.state_dict())
    for number in range(accumulation):
        loss = forward_backward(engine, batch_of(number), seed=0)
        own = alone(**prepared(alone, batch_of(number), seed=0))[0]
        (own / accumulation).backward()
        assert loss.item() == pytest.approx(own.item(), rel=1e-6)
        assert not loss.requires_grad
        engine.deepspeed.step()
    norm = torch.stack([p.grad.norm() for p in alone.parameters() if p.grad is not None]).norm()
    assert float(engine.deepspeed.get_global_grad_norm()) == pytest.approx(norm.item(), rel=1e-5)


class RootOfStep(Brightness):
    """Learns by one root over all images of a step, for which it runs the student first."""

    def two_passes(self, micro_batches):
        return True

    def begin_sums(self, micro_batches):
        self.noted.append(micro_batches)

    def sums(self, forward, prepared):
        assert not torch.is_grad_enabled()
        self.noted.append("sums")
        return forward(**prepared, for_sums=True)

    def with_totals(self, prepared, totals, *, parts):
        self.noted.append("turn")
        return {**prepared, "totals": totals, "parts": parts}

    def forward(self, *, totals=None, parts=1, for_sums=False, **prepared):
        mean, _ = super().forward(**prepared)
        own = len(prepared["targets"]) * mean.double()
        if for_sums:
            return torch.stack([own, torch.full_like(own, len(prepared["targets"]))])
        root = (totals[0] / totals[1]).sqrt()
        return root + parts * (own - own.detach()) / totals[1] / (2 * root), {}


@pytest.mark.parametrize("config", ["whole", "flat", "sharded"])
def test_a_step_in_two_passes_is_one_whatever_its_micro_batches(make_engine, config):
    found = {}
    whole = batch_of(0, size=6)
    for count in (1, 3):
        engine = make_engine(config, accumulation=count, make_task=RootOfStep)
        engine.task.noted = noted = []
        parts = [
            Batch(whole.images[i::count], 0, whole.positions[i::count], whole.indices[i::count])
            for i in range(count)
        ]
        losses = []
        for step in range(2):
            arguments = arguments_of_step(engine.task, engine.deepspeed, parts, seed=0, count=count)
            for each in arguments:
                losses.append(backward(engine, each).item())
                engine.deepspeed.step()
            assert noted == [count] + ["sums"] * count + ["turn"] * count, step
            noted.clear()
        found[count] = [*losses[::count], float(engine.deepspeed.get_global_grad_norm())]
        # Each micro batch gives the loss of the whole step.
        assert losses[:count] == pytest.approx([losses[0]] * count, rel=1e-6)
    assert found[3] == pytest.approx(found[1], rel=1e-3 if config == "flat" else 1e-5)


def test_two_ranks_agree_on_a_step(monkeypatch):
    task, whole = RootOfStep(), batch_of(0, size=6)
    task.noted = []
    (only,) = arguments_of_step(task, task, [whole], seed=0, count=1)
    world = pretended_ranks.World(monkeypatch, 2)

    def rank():
        mine = slice(pretended_ranks.rank(), None, 2)
        batch = Batch(whole.images[mine], 0, whole.positions[mine], whole.indices[mine])
        return next(arguments_of_step(task, task, [batch], seed=0, count=1))

    first, second = world.run(rank)
    assert torch.equal(first["totals"], second["totals"])
    torch.testing.assert_close(first["totals"], only["totals"], rtol=1e-6, atol=0)
    assert (only["parts"], first["parts"]) == (1, 2)
