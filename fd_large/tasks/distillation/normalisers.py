"""Normalisers of a teacher's tokens, which make the targets that the student learns.

To add a normaliser, add a line in `NORMALISERS`, or write a file and name it by
`objective.normaliser module:FILE.py:NAME`. A normaliser is a function from the tokens (..., C) of a
micro-batch to float32 tokens of the same shape; the result for a token must not depend on other
tokens. Two built-in normalisers read statistics of the teacher's channels from a file
(target_statistics.py). An invertible normaliser has a method `undo`, which returns an `Undo`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fd_large import doors
from fd_large.errors import ConfigError
from fd_large.kernels.whitened_loss import whiten
from fd_large.tasks.distillation import target_statistics
from fd_large.tasks.distillation.target_statistics import TargetStatistics

WHERE = "objective.normaliser"
NONE = "none"
WHITENING = "whitening"
"""The default normaliser, which a fused kernel may compute together with the loss."""

Normaliser = Callable[[Tensor], Tensor]
_TRIAL_WIDTH = 8


def none(tokens: Tensor) -> Tensor:
    """Returns `tokens`, (..., C), unchanged; in float64 if they were float64, else in float32."""
    return tokens.to(torch.promote_types(tokens.dtype, torch.float32))


def unbiased_whitening(tokens: Tensor) -> Tensor:
    """Normalises each token (..., C) to mean 0 and unbiased variance 1, as dBOT and MAE do.

    The result is in float64 if the tokens were float64, else in float32.
    """
    variance, mean = torch.var_mean(none(tokens), dim=-1, keepdim=True)
    return (none(tokens) - mean) / (variance + 1e-6).sqrt()


class Affine:
    """Normaliser that subtracts a mean from tokens, then scales or rotates their channels.

    Args:
        mean: (C,), the mean of each channel.
        factor: (C,), a factor for each channel; or a matrix (C, C), each row of which computes an
            output channel.

    Attributes:
        width: Number of channels, C.
        constants: The pair (mean, factor).
    """

    def __init__(self, mean: Tensor, factor: Tensor) -> None:
        self.width, self.constants = len(mean), (mean, factor)
        self._constants = {(mean.device, mean.dtype): self.constants}

    def __call__(self, tokens: Tensor) -> Tensor:
        """Returns the normalised tokens (..., C), in float64 if they were float64, else in float32.

        Args:
            tokens: (..., C), of any floating-point dtype.
        """
        tokens = none(tokens)
        key = (tokens.device, tokens.dtype)
        if key not in self._constants:
            mean, factor = (constant.to(*key) for constant in self.constants)
            self._constants[key] = mean, factor
        mean, factor = self._constants[key]
        centred = tokens - mean
        return centred * factor if factor.ndim == 1 else centred @ factor.T

    def undo(self) -> Undo:
        """Returns the inverse, which maps normalised tokens to the teacher's tokens."""
        mean, factor = (constant.double() for constant in self.constants)
        both = mean.expand(2, -1)
        if factor.ndim == 1:
            return Undo(both, factor.reciprocal().expand(2, -1), None)
        return Undo(both, None, torch.linalg.inv(factor))


def standardise(statistics: TargetStatistics) -> Affine:
    """Returns the normaliser that gives every channel mean 0 and variance 1.

    A standard deviation below 0.001 counts as 0.001, as in DUNE (arXiv 2503.14405).

    Args:
        statistics: Mean and deviation of each channel of the teacher.
    """
    return Affine(statistics.mean, statistics.deviation.clamp(min=1e-3).reciprocal())


def phi_s(statistics: TargetStatistics) -> Affine:
    """Returns the normaliser that rotates the channels so that every channel has variance 1.

    All channels are scaled by the same number; see `phi_s_matrix`.

    Args:
        statistics: Mean and rotation of the teacher's channels.
    """
    return Affine(statistics.mean, statistics.phi_s)


NORMALISERS: dict[str, Any] = {
    WHITENING: whiten,
    "unbiased_whitening": unbiased_whitening,
    NONE: none,
}
"""The built-in normalisers that need no file, by name."""
BY_STATISTICS: dict[str, Callable[[TargetStatistics], Affine]] = {
    "standardise": standardise,
    "phi_s": phi_s,
}
"""The constructors of the built-in normalisers that need a file of statistics, by name."""


class Undo(nn.Module):
    """The inverse of a normaliser, which maps normalised tokens to the teacher's tokens.

    The first row of `mean` and of `scale` is for prefix tokens, the second for patches.

    Args:
        mean: (2, C), which is added last.
        scale: (2, C), which multiplies the channels; None if channels are rotated.
        rotation: (C, C), each row of which computes a channel of the teacher; None if channels are
            only scaled.
    """

    def __init__(self, mean: Tensor, scale: Tensor | None, rotation: Tensor | None) -> None:
        super().__init__()
        self.register_buffer("mean", mean.float())
        self.register_buffer("scale", None if scale is None else scale.float())
        self.register_buffer("rotation", None if rotation is None else rotation.float())

    def forward(self, tokens: Tensor, num_prefix_tokens: int) -> Tensor:
        """Returns the teacher's tokens, (B, N, C) float32.

        Args:
            tokens: (B, N, C), normalised.
            num_prefix_tokens: Number of tokens of an image before its patches.
        """
        rows = (torch.arange(tokens.shape[1], device=tokens.device) >= num_prefix_tokens).long()
        if self.rotation is not None:
            return tokens.float() @ self.rotation.T + self.mean[rows]
        return tokens.float() * self.scale[rows] + self.mean[rows]


def make_normaliser(
    name: str,
    *,
    eps: float,
    statistics: str = "",
    width: int = _TRIAL_WIDTH,
    running: Mapping[str, Callable[[int], Normaliser]] = MappingProxyType({}),
) -> Normaliser:
    """Returns the normaliser that a recipe names.

    Args:
        name: A name in `NORMALISERS`, `BY_STATISTICS` or `running`, or the user's own
            `module:FILE.py:NAME` (fd_large/doors.py).
        eps: `objective.whitening_eps`, for whitening.
        statistics: `objective.target_statistics`, the path of a file.
        width: Number of channels of the teacher's tokens, for a name in `running`.
        running: Constructors of the normalisers whose statistics training updates, by name; each
            takes the number of channels.

    Raises: ConfigError: if the normaliser or its file does not exist.
    """
    known = NORMALISERS | BY_STATISTICS | dict(running)
    function_or_class = doors.load(name, kind="normalisers", where=WHERE, built_in=known)
    if name in BY_STATISTICS:
        return function_or_class(target_statistics.read(statistics))
    if name in running:
        return function_or_class(width)
    return partial(whiten, eps=eps) if name == WHITENING else function_or_class


def check_normaliser(normaliser: Normaliser, name: str) -> None:
    """Checks a normaliser by a call on a few tokens.

    Args:
        normaliser: The normaliser.
        name: The normaliser's name in the recipe, for messages.

    Raises:
        ConfigError: if the call fails, if the result is not float32 of the same shape, or if the
            result for a token depends on other tokens.
    """
    width = getattr(normaliser, "width", _TRIAL_WIDTH)
    tokens = torch.randn(2, 3, width, generator=torch.Generator().manual_seed(0))
    try:
        normalised = normaliser(tokens)
        got = f"{tuple(normalised.shape)} of type {normalised.dtype}"
        fits = normalised.shape == tokens.shape and normalised.dtype == torch.float32
        alone = fits and torch.allclose(
            normalised[:1, :1], normaliser(tokens[:1, :1]), rtol=1e-4, atol=1e-5
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
