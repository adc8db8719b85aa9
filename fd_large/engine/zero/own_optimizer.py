"""Tries an optimiser of the user's own on a few numbers before it trains a model.

ZeRO steps flat parts of many tensors, so an optimiser must act element by element; an optimiser
that scales gradients by norms of whole tensors has a method for this (`trust_ratio.py`). The trial
also shows which state the optimiser keeps for each parameter, as checkpoints and layer-wise
learning rates need to know.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fd_large import doors
from fd_large.errors import ConfigError
from fd_large.recipes.sections import Optim

RESERVED = ("master", "ema")
"""Kinds of tensors in a checkpoint that are not moments."""


class Kept(NamedTuple):
    """The state that an optimiser keeps for each tensor that it steps.

    Attributes:
        moments: Initial value of each float32 tensor of the parameter's shape, by name.
        count: Function that maps a tensor and a number of steps to the value of the entry "step"
            after these steps; None if the optimiser keeps no such entry.
    """

    moments: dict[str, float]
    count: Callable[[Tensor, int], Any] | None


def tried(make: Callable[..., Any], optim: Optim, device: torch.device) -> Kept:
    """Returns the state that an optimiser keeps, after trials on a whole tensor and on its parts.

    Args:
        make: Makes the optimiser from (groups, lr=...).
        optim: The recipe's section, for messages and the weight decay.
        device: Device of the numbers.

    Raises:
        ConfigError: If the optimiser fails, if the parts change in another way than the whole
            tensor, or if a checkpoint could not hold the state.
    """
    try:
        whole, state, group = _trial(make, [(8, 8)], device)
        flat, _, _ = _trial(make, [(64,)], device)
        parts, _, _ = _trial(make, [(24,), (40,)], device)
        alone, _, _ = _trial(make, [(24,)], device)  # As on a rank that has this part only.
        _, first, _ = _trial(make, [(8,)], device, steps=1, still=True)
    except Exception as error:  # The user's code may raise anything.
        raise _unfit(
            optim, f"cannot make a step; got {doors.cause(error)}", "an optimiser of torch"
        ) from error
    if optim.weight_decay and "weight_decay" not in group:
        raise _unfit(
            optim, f"has no weight decay; got {optim.weight_decay}", "optim.weight_decay 0"
        )
    others = (whole, parts, alone)
    if not all(torch.allclose(flat[: len(o)], o, rtol=1e-3, atol=1e-6) for o in others):
        raise _unfit(
            optim,
            "does not act element by element; got different steps for parts of a tensor and for "
            "the whole",
            "equal steps, since ZeRO updates parts",
        )
    moments, count = {}, None
    for name, value in state.items():
        is_moment = isinstance(value, Tensor) and value.shape == (8, 8) and name.isidentifier()
        if is_moment and name not in RESERVED and value.dtype == torch.float32:
            moments[name] = first[name].flatten()[0].item()
        elif name == "step":
            count = _count_like(value)
        elif value is not None:
            kind = f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else value
            raise _unfit(
                optim,
                f"keeps state that a checkpoint cannot store; got {name!r}: {kind}",
                f"float32 tensors of the parameter's shape, not named {' or '.join(RESERVED)}, and "
                "a count 'step'",
            )
    return Kept(moments, count)


def _trial(
    make: Callable[..., Any],
    shapes: list[tuple[int, ...]],
    device: torch.device,
    *,
    steps: int = 3,
    still: bool = False,
) -> tuple[Tensor, dict[str, Any], dict[str, Any]]:
    """Steps an optimiser on random numbers.

    Args:
        make: Makes the optimiser.
        shapes: Shapes of the parameters, at most 64 elements in all.
        device: Device of the parameters.
        steps: Number of steps.
        still: Whether numbers and gradients are zeros instead of random.

    Returns: the flattened changes of the numbers, the state of the first tensor, and the
        optimiser's defaults.
    """
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(steps + 1, 64, generator=generator).to(device) * (not still)
    # Parts of unlike sizes, so that an optimiser that looks at norms is found out.
    draws[1:, 24:] *= 100
    sizes = [torch.Size(shape).numel() for shape in shapes]

    def cut(row: Tensor) -> list[Tensor]:
        pieces = row[: sum(sizes)].split(sizes)
        return [piece.clone().view(shape) for piece, shape in zip(pieces, shapes, strict=True)]

    parameters = [nn.Parameter(piece) for piece in cut(draws[0])]
    optimizer = make([{"params": parameters, "weight_decay": 0.1}], lr=0.01)
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise TypeError(f"{type(optimizer).__name__} is not a torch.optim.Optimizer")
    if optimizer.state:
        # DeepSpeed puts flat tensors in the place of the parameters before the first step.
        raise TypeError("its state exists before the first step")
    group = optimizer.param_groups[0]
    before = {name: value for name, value in group.items() if name not in ("params", "step")}
    for row in draws[1:]:
        for parameter, piece in zip(parameters, cut(row), strict=True):
            parameter.grad = piece
        optimizer.step()
    if changed := [name for name, value in before.items() if group[name] != value]:
        raise TypeError(
            f"it changes {', '.join(changed)} of its groups, which checkpoints do not store"
        )
    end = torch.cat([parameter.detach().flatten() for parameter in parameters])
    return end - draws[0, : len(end)], dict(optimizer.state[parameters[0]]), optimizer.defaults


def _count_like(value: Any) -> Callable[[Tensor, int], Any]:
    """Returns a function of (tensor, steps), of which the result is `steps` in the form of `value`.

    If `value` is a tensor, the result has its data type and device. The argument tensor is ignored.
    """
    if not isinstance(value, Tensor):
        return lambda owner, steps: type(value)(steps)
    return lambda owner, steps: torch.tensor(steps, dtype=value.dtype, device=value.device)


def _unfit(optim: Optim, problem: str, expected: str) -> ConfigError:
    return ConfigError(
        f"optim.name: {optim.name} {problem}, expected {expected}. Use another optimiser."
    )
