"""What is done to a teacher's tokens before the student learns them.

Adding a normaliser is a line in `NORMALISERS`, or a file of the user's own
(`objective.normaliser module:FILE.py:NAME`): a function from tokens (..., C) to float32 of the same
shape. It works on the tokens of a micro batch, and so must treat each token alone.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor

from fd_large import doors
from fd_large.errors import ConfigError
from fd_large.kernels.whitened_loss import whiten

WHERE = "objective.normaliser"
WHITENING = "whitening"
"""The default, which a fused kernel may compute together with the loss."""

Normaliser = Callable[[Tensor], Tensor]


def none(tokens: Tensor) -> Tensor:
    """Returns the tokens as they are, in float32 (float64 stays)."""
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))


NORMALISERS: dict[str, Any] = {WHITENING: whiten, "none": none}
"""The built-in normalisers."""


def make_normaliser(name: str, *, eps: float) -> Normaliser:
    """Returns the normaliser that a recipe names.

    Args:
        name: A name in `NORMALISERS`, or one of the user's own (fd_large/doors.py).
        eps: `objective.whitening_eps`, for whitening.

    Raises: ConfigError: if there is no such normaliser.
    """
    found = doors.load(name, kind="normalisers", where=WHERE, built_in=NORMALISERS)
    return partial(whiten, eps=eps) if name == WHITENING else found


def check_normaliser(normaliser: Normaliser, name: str) -> None:
    """Calls a normaliser on a few tokens.

    Raises: ConfigError: if that fails, changes the shape, or mixes tokens.
    """
    tokens = torch.randn(2, 3, 8, generator=torch.Generator().manual_seed(0))
    try:
        given = normaliser(tokens)
        got = f"{tuple(given.shape)} of type {given.dtype}"
        fits = given.shape == tokens.shape and given.dtype == torch.float32
        alone = fits and torch.allclose(
            given[:1, :1], normaliser(tokens[:1, :1]), rtol=1e-4, atol=1e-5
        )
    except Exception as error:  # The user's code may raise anything.
        got, fits, alone = doors.cause(error), False, False
    if not fits:
        raise ConfigError(
            f"{WHERE}: {name} does not work on tokens (2, 3, 8); got {got}, expected float32 of "
            "the same shape. Correct the function."
        )
    if not alone:
        raise ConfigError(
            f"{WHERE}: {name} mixes tokens; got other values for one token than for it among "
            "others, expected a function of each token alone, because micro batches and ranks must "
            "not change a target. Correct the function."
        )
