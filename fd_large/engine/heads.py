"""Constructs heads by their names in a recipe: a task's built-in heads, or the user's own.

The user's own head is made by a function or Module class that takes (width, out_width), and maps
(..., width) to (..., out_width).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn

from fd_large import doors
from fd_large.backbones.random_draws import Draws, refuse_chance
from fd_large.errors import ConfigError

Make = Callable[..., nn.Module]


def make_head(
    name: str, *arguments: Any, built_in: Mapping[str, Make], where: str, **settings: int
) -> nn.Module:
    """Constructs a head, with weights from torch's global generator.

    Args:
        name: A built-in name; or the user's own head, as module:FILE.py:NAME, as
            module:package.module:NAME or by the name of an installed plugin's entry point.
        arguments: Positional arguments of the head's constructor: input and output channels.
        built_in: Constructors of the task's own heads, by name.
        where: The field that the user set, for messages.
        settings: Keyword arguments of the head's constructor.

    Raises:
        ConfigError: If there is no such head, its constructor fails or returns no Module, or the
            user's own head makes a step depend on rank or micro batch.
    """
    make = doors.load(name, kind="heads", where=where, built_in=built_in)
    if name in built_in:
        return make(*arguments, **settings)
    try:
        head = make(*arguments, **settings)
    except Exception as error:  # The user's code may raise anything.
        raise ConfigError(
            f"{where}: {name} cannot be made; got {doors.cause(error)}, expected a Module from "
            f"{arguments}. Correct the head."
        ) from error
    if not isinstance(head, nn.Module):
        raise ConfigError(
            f"{where}: {name} returns no Module; got {type(head).__name__}, expected a torch "
            f"Module from {arguments}. Correct the head."
        )
    refuse_chance(head, name, where=where)
    return head


def check_head(
    head: nn.Module, name: str, shape: tuple[int, ...], out_width: int, *, where: str
) -> None:
    """Checks the output shape of a head by running the head on the meta device, where it was built.

    Args:
        head: The head.
        name: Name of the head in the recipe.
        shape: Shape of the input, with the channels last.
        out_width: Number of channels that the output must have.
        where: The field that the user set, for messages.

    Raises: ConfigError: if the head fails, returns another shape, or draws random numbers.
    """
    expected = (*shape[:-1], out_width)
    try:
        with Draws() as draws, torch.no_grad():
            got = str(tuple(head(torch.empty(shape, device="meta")).shape))
        if draws.seen:
            got = f"random draws ({', '.join(sorted(draws.seen))})"
    except Exception as error:  # The user's code may raise anything.
        got = doors.cause(error)
    if got != str(expected):
        raise ConfigError(
            f"{where}: {name} does not fit; got {got} from {shape}, expected {expected}. "
            "Correct the head."
        )
