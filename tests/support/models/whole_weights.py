"""The whole parameters of a module that may be split over ranks."""

from __future__ import annotations

from collections.abc import Iterator

import deepspeed
from torch import Tensor, nn

from fd_large.engine.zero.partition import is_partitioned


def whole_weights(module: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Yields (name, full value in host memory), gathering one parameter at a time; a collective."""
    for name, parameter in module.named_parameters():
        split = is_partitioned(parameter)
        with deepspeed.zero.GatheredParameters([parameter] if split else [], enabled=split):
            value = parameter.detach().to("cpu", copy=True)
        yield name, value
