"""Weights into a built network: each rank takes its own slice, every name must find its place."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fd_large.engine import partition
from fd_large.errors import WeightsError


def load_weights(net: nn.Module, items: Iterable[tuple[str, Tensor]], *, where: str) -> int:
    """Copies full tensors into a network, whole or partitioned, without communication.

    Args:
        net: Parameters in pieces or whole.
        items: (name, full tensor), the network's own names, the same on every rank.
        where: What the user set, for the message.

    Returns: the number of tensors taken.
    Raises: WeightsError: if a name is missing, left over or of another shape.
    """
    parameters = dict(net.named_parameters())
    seen: set[str] = set()
    left_over, misfits = [], []
    with torch.no_grad():
        for name, tensor in items:
            parameter = parameters.get(name)
            if parameter is None:
                left_over.append(name)
            elif tuple(tensor.shape) != tuple(partition.shape(parameter)):
                misfits.append(
                    f"{name} {tuple(tensor.shape)} for {tuple(partition.shape(parameter))}"
                )
            else:
                partition.write(parameter, tensor)
                seen.add(name)
    missing = [name for name in parameters if name not in seen]
    if left_over or misfits or missing:
        fitting = [m.split()[0] for m in misfits]
        found = "; ".join(
            f"{label} {len(names)}: {', '.join(names[:3])}{' ...' if len(names) > 3 else ''}"
            for label, names in (
                ("missing", [name for name in missing if name not in fitting]),
                ("left over", left_over),
                ("of another shape", misfits),
            )
            if names
        )
        raise WeightsError(
            f"{where}: the weights do not fit the network; got {found}, expected every tensor once "
            "and in shape. Name the network that the file holds (--teacher.model, "
            "--teacher.architecture.*)."
        )
    return len(seen)
