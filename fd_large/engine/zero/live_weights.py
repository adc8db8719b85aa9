"""Weights into a built network: each rank takes its own slice, every name must find its place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fd_large.engine.zero import partition
from fd_large.weights.coverage import Fitted, covered


def load_weights(net: nn.Module, items: Iterable[tuple[str, Tensor]], *, where: str) -> None:
    """Copies full tensors into a network, whole or partitioned, without communication.

    Buffers of floating-point numbers that belong to the state (running statistics of batch
    normalisation) are weights too; every rank holds them whole.

    Args:
        model: Parameters in pieces or whole.
        items: (name, full tensor), the network's own names, the same on every rank; of a file with
            gaps that the user allowed, those stay as they are.
        where: What the user set, for the message.

    Raises: WeightsError: if a name is missing, left over or of another shape.
    """
    held: dict[str, Tensor] = dict(net.named_parameters())
    persistent = net.state_dict().keys()
    for name, buffer in net.named_buffers():
        if buffer.is_floating_point() and name in persistent:
            held[name] = buffer
    expected = {name: tuple(partition.shape(tensor)) for name, tensor in held.items()}
    gaps = items.may_be_missing if isinstance(items, Fitted) else frozenset()
    with torch.no_grad():
        for name, tensor in covered(expected, items, where=where, may_be_missing=gaps):
            partition.write(held[name], tensor)
