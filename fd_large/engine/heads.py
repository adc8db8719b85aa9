"""A head by its name in a recipe: a built-in one of a task, or the user's own.

A head of the user's own is a function or Module class of (width, out_width), and maps (..., width)
to (..., out_width).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import nn

from fd_large import doors
from fd_large.errors import ConfigError

Make = Callable[[int, int], nn.Module]


def make_head(
    name: str, width: int, out_width: int, *, built_in: Mapping[str, Make], where: str
) -> nn.Module:
    """Constructs a head, with weights from torch's global generator.

    Args:
        name: A built-in name, or one of the user's own (fd_large/doors.py).
        width: Channels of what it takes.
        out_width: Channels of what it gives.
        built_in: The task's own heads.
        where: The field that the user set, for messages.

    Raises: ConfigError: if there is no such head, or it is no Module.
    """
    make = doors.load(name, kind="heads", where=where, built_in=built_in)
    try:
        head = make(width, out_width)
    except Exception as error:  # The user's code may raise anything.
        raise ConfigError(
            f"{where}: {name} cannot be made; got {type(error).__name__}: {error}, expected a "
            f"Module from ({width}, {out_width}). Correct the head."
        ) from error
    if not isinstance(head, nn.Module):
        raise ConfigError(
            f"{where}: {name} gives no Module; got {type(head).__name__}, expected a torch Module "
            f"made of ({width}, {out_width}). Correct the head."
        )
    return head


def check_head(
    head: nn.Module, name: str, shape: tuple[int, ...], out_width: int, *, where: str
) -> None:
    """Runs a head that was built on the meta device on an input of some shape.

    Args:
        head: The head.
        name: Its name in the recipe.
        shape: Shape of the input.
        out_width: Channels of what it has to give.
        where: The field that the user set, for messages.

    Raises: ConfigError: if that fails, or gives another shape.
    """
    wanted = (*shape[:-1], out_width)
    try:
        with torch.no_grad():
            got = str(tuple(head(torch.empty(shape, device="meta")).shape))
    except Exception as error:  # The user's code may raise anything.
        got = f"{type(error).__name__}: {error}".splitlines()[0]
    if got != str(wanted):
        raise ConfigError(
            f"{where}: {name} does not fit; got {got} from {shape}, expected {wanted}. "
            "Correct the head."
        )
