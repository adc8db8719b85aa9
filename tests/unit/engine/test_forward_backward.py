"""One micro batch: what it draws, its loss, and its gradient in a real engine."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from unit.engine.conftest import Brightness, batch_of

from fd_large.data.random_numbers import drop_path_keep
from fd_large.engine.forward_backward import forward_backward, prepared


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
