"""Computes the loss around trained weights, along filter-normalised random directions.

Source: Li et al., "Visualizing the Loss Landscape of Neural Nets", arXiv 1712.09913.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch
from torch import Tensor, nn

Direction = dict[str, Tensor]
Value = TypeVar("Value")


def random_direction(module: nn.Module, seed: int) -> Direction:
    """Returns a normally distributed direction of the parameters, scaled to each filter's norm.

    A filter is the part of a weight for one output (an index of its first dimension). Vectors
    (biases, norms, LayerScale) have no direction and stay fixed, as in arXiv 1712.09913.

    Args:
        module: The module whose parameters will be moved.
        seed: Seed of the direction. Numbers are drawn on the CPU, and are equal on every machine.

    Returns: {name of the parameter: direction with the parameter's shape, device and dtype}.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = {}
    for name, parameter in module.named_parameters():
        if parameter.dim() < 2:
            continue
        drawn = torch.randn(parameter.shape, generator=generator).to(parameter)
        filters, weights = drawn.flatten(1), parameter.detach().flatten(1)
        length = filters.norm(dim=1, keepdim=True).clamp(min=1e-30)
        direction[name] = (filters * (weights.norm(dim=1, keepdim=True) / length)).view_as(drawn)
    return direction


@contextmanager
def _movable(module: nn.Module) -> Iterator[Callable[[Sequence[tuple[float, Direction]]], None]]:
    """Yields a function that sets the parameters of `module` to start + sum of step * direction.

    The argument of the function is a list of pairs (step, direction). The start is the parameters'
    values before the block, which are restored after the block.
    """
    parameters = dict(module.named_parameters())
    start = {name: p.detach().clone() for name, p in parameters.items() if p.dim() >= 2}

    def move(steps: Sequence[tuple[float, Direction]]) -> None:
        with torch.no_grad():
            for name, origin in start.items():
                at = origin
                for step, direction in steps:
                    if step:  # At zero the weights are the model's own, to the bit.
                        at = torch.add(at, direction[name], alpha=step)
                parameters[name].copy_(at)

    try:
        yield move
    finally:
        move(())


def curve(
    module: nn.Module,
    loss: Callable[[], Value],
    direction: Direction,
    steps: Sequence[float],
    progress: Callable[[], None],
) -> list[Value]:
    """Returns the loss at start + step * direction for each step.

    Args:
        module: The module whose parameters are moved, and restored at the end.
        loss: Function that returns one or several losses for the present parameters.
        direction: A result of `random_direction`.
        steps: Steps along the direction; at 0 the parameters are unchanged.
        progress: Function that is called after every loss.
    """
    values = []
    with _movable(module) as move, torch.no_grad():
        for step in steps:
            move([(step, direction)])
            values.append(loss())
            progress()
    return values


def surface(
    module: nn.Module,
    loss: Callable[[], Value],
    directions: tuple[Direction, Direction],
    steps: Sequence[float],
    progress: Callable[[], None],
) -> list[list[Value]]:
    """Returns the losses on the plane that two directions span.

    Args:
        module, loss, progress: As for `curve`.
        directions: Two results of `random_direction`.
        steps: Steps along each direction; at 0 the parameters are unchanged.

    Returns: rows for the steps along the second direction; a row has the losses for the steps along
        the first direction.
    """
    rows: list[list[Value]] = []
    with _movable(module) as move, torch.no_grad():
        for second in steps:
            rows.append([])
            for first in steps:
                move([(first, directions[0]), (second, directions[1])])
                rows[-1].append(loss())
                progress()
    return rows
