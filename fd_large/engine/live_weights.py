"""Weights into a built network: each rank takes its own slice, every name must find its place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fd_large.engine import partition
from fd_large.weights.formats import covered


def load_weights(net: nn.Module, items: Iterable[tuple[str, Tensor]], *, where: str) -> None:
    """Copies full tensors into a network, whole or partitioned, without communication.

    Args:
        net: Parameters in pieces or whole.
        items: (name, full tensor), the network's own names, the same on every rank.
        where: What the user set, for the message.

    Raises: WeightsError: if a name is missing, left over or of another shape.
    """
    parameters = dict(net.named_parameters())
    expected = {name: tuple(partition.shape(p)) for name, p in parameters.items()}
    with torch.no_grad():
        for name, tensor in covered(expected, items, where=where):
            partition.write(parameters[name], tensor)
