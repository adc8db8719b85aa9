"""What a skipped step was made of: its images, and how large each layer's output became.

The step is run forward once more on the unchanged weights, on every rank alike, so that the
ordinary step pays nothing for the record.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fd_large import distributed
from fd_large.data.loader import Batch
from fd_large.engine.forward_backward import prepared
from fd_large.engine.task import Task
from fd_large.engine.zero.engine import Engine
from fd_large.runtime.hooks import Evidence


def evidence_of(
    engine: Engine, batches: Sequence[Batch], losses: Sequence[float], seed: int
) -> Evidence:
    """Gathers the evidence of a step; all ranks call it, with their own micro batches.

    Args:
        engine: After the refused step.
        batches: This rank's micro batches, as the loader gave them.
        losses: Their losses.
        seed: Of the drop-path draws.
    """
    return Evidence(
        images=torch.cat([batch.images for batch in batches]).cpu(),
        positions=torch.cat([batch.positions for batch in batches]),
        indices=torch.cat([batch.indices for batch in batches]),
        losses=list(losses),
        maxima=_layer_maxima(engine, batches, seed),
    )


def _layer_maxima(engine: Engine, batches: Sequence[Batch], seed: int) -> dict[str, float]:
    """Layer -> largest magnitude of its output over the step's images and all ranks."""
    maxima: dict[str, Tensor] = {}

    def note(name: str, output: Tensor) -> None:
        note_maximum(maxima, name, output)

    with outputs_to(note, engine.task), torch.no_grad():
        for batch in batches:
            engine.deepspeed(**prepared(engine.task, batch, seed))
    # A NaN in a maximum over ranks is lost on some backends; infinity is not.
    values = torch.nan_to_num(torch.stack(list(maxima.values())), nan=torch.inf, posinf=torch.inf)
    return dict(zip(maxima, distributed.max_tensor(values).tolist(), strict=True))


@contextmanager
def outputs_to(note: Callable[[str, Tensor], None], task: Task) -> Iterator[None]:
    """Hands the name and output of each layer that runs, a module with own weights, to `note`."""

    def seen(name: str, output: Any) -> None:
        # A feature map, and what a norm with a residual returns, begins with the tokens.
        values = output[0] if isinstance(output, tuple) else output
        if isinstance(values, Tensor) and values.is_floating_point() and values.numel():
            note(name, values)

    hooks = [
        module.register_forward_hook(lambda _m, _i, output, name=prefix + name: seen(name, output))
        for prefix, net in task.nets().items()
        for name, module in net.named_modules()
        if _is_layer(module)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def note_maximum(maxima: dict[str, Tensor], name: str, values: Tensor) -> None:
    """Keeps the largest magnitude that a name has shown, a float32 scalar on the device."""
    largest = values.detach().abs().amax().float()
    maxima[name] = torch.maximum(maxima[name], largest) if name in maxima else largest


def _is_layer(module: nn.Module) -> bool:
    return next(module.parameters(recurse=False), None) is not None
