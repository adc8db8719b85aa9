"""Gathers evidence of a skipped step: images, each layer's largest output, non-finite state.

After a skipped step, all ranks run the step's forward once more, on the unchanged weights. So the
record costs no time in a step that is not skipped.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from fd_large.data.loader import Batch
from fd_large.engine.forward_backward import arguments_of_step
from fd_large.engine.task import Task
from fd_large.engine.zero import state
from fd_large.engine.zero.engine import Engine
from fd_large.ranks import distributed
from fd_large.runtime.hooks import Evidence


def evidence_of(
    engine: Engine, batches: Sequence[Batch], losses: Sequence[float], seed: int
) -> Evidence:
    """Gathers the evidence of a skipped step; all ranks must call this function after the step.

    `batches` are this rank's micro batches of the step as the loader yielded them, with their
    losses. `seed` is that of the drop path.
    """
    with layer_maxima(engine.task) as maxima, torch.no_grad():
        for arguments in arguments_of_step(
            engine.task, engine.deepspeed, batches, seed, count=len(batches)
        ):
            engine.deepspeed(**arguments)
    # A NaN in a maximum over ranks is lost on some backends; infinity is not.
    values = torch.nan_to_num(torch.stack(list(maxima.values())), nan=torch.inf, posinf=torch.inf)
    over_ranks = distributed.max_tensor(values).tolist()
    return Evidence(
        images=[batch.images.cpu() for batch in batches],
        positions=torch.cat([batch.positions for batch in batches]),
        indices=torch.cat([batch.indices for batch in batches]),
        losses=list(losses),
        maxima=dict(zip(maxima, over_ranks, strict=True)),
        not_finite=state.not_finite(engine),
    )


@contextmanager
def layer_maxima(task: Task) -> Iterator[dict[str, Tensor]]:
    """Records the largest magnitude of each layer's output within the context.

    A layer is a module of `task.models()` with parameters of its own. Yields a dictionary from the
    layer's name to a float32 scalar on the device, which forward passes fill in execution order. If
    a layer runs several times, the largest value counts.
    """
    maxima: dict[str, Tensor] = {}

    def note(name: str, output: Any) -> None:
        # A feature map, or the result of a norm with a residual, begins with the tokens.
        values = output[0] if isinstance(output, tuple) else output
        if isinstance(values, Tensor) and values.is_floating_point() and values.numel():
            largest = values.detach().abs().amax().float()
            maxima[name] = torch.maximum(maxima[name], largest) if name in maxima else largest

    hooks = [
        module.register_forward_hook(lambda _m, _i, output, name=prefix + name: note(name, output))
        for prefix, model in task.models().items()
        for name, module in model.named_modules()
        if next(module.parameters(recurse=False), None) is not None
    ]
    try:
        yield maxima
    finally:
        for hook in hooks:
            hook.remove()
