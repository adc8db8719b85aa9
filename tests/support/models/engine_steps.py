"""Steps of an engine at the learning rates of a schedule, without the training loop."""

from __future__ import annotations

from functools import partial

from torch import Tensor

from fd_large.data.loader import Batch
from fd_large.engine.forward_backward import forward_backward
from fd_large.engine.schedule import CosineSchedule
from fd_large.engine.zero.engine import Engine
from fd_large.engine.zero.layer_decay import LayerLearningRates
from fd_large.engine.zero.optimizer import set_learning_rate


def forward_at(
    engine: Engine,
    schedule: CosineSchedule,
    number: int,
    batch: Batch,
    layer_rates: LayerLearningRates | None = None,
) -> Tensor:
    """Sets the learning rate of a step, and runs forward and backward; returns the loss."""
    set_learning_rate(engine.deepspeed.optimizer, schedule.at_step(number))
    if layer_rates is not None:
        layer_rates.at_scale = partial(schedule.scaled_at, number)
    return forward_backward(engine, batch, 0)
