"""The losses between projected student tokens and the normalised tokens of the teacher.

Adding one is a line in `LOSSES`, or a file of the user's own, `objective.loss
module:FILE.py:NAME`: a function of (projected, target), both (..., C) float32, that returns the
mean over all tokens as a scalar, or a subclass of `Loss`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_large import doors
from fd_large.errors import ConfigError
from fd_large.kernels.whitened_loss import whitened_loss

WHERE = "objective.loss"


class Loss:
    """A loss, with what evaluations and plots need of it.

    Args:
        beta: `objective.beta`, for a loss that has such a number.

    Attributes:
        label: Its words in logs and plots.
    """

    label = "loss"

    def __init__(self, beta: float = 2.0) -> None:
        self.beta = beta

    def __call__(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns the loss, a scalar.

        Args:
            projected: (..., C) float32, student tokens after the head.
            target: (..., C) float32, teacher tokens after the normaliser; takes no gradient.
        """
        raise NotImplementedError

    def total(self, projected: Tensor, target: Tensor) -> tuple[Tensor, int]:
        """Returns the sum of the loss over (tokens, C) and the number of its terms."""
        return self(projected, target) * len(target), len(target)

    def newton(self, constant: Tensor, target: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns slope and curvature by a constant prediction, each (C,), summed over tokens.

        None leaves the constant-prediction baseline at the mean of the targets, which is the best
        constant of a squared error, and of a cosine between tokens of equal length.

        Args:
            constant: (C,) float32.
            target: (tokens, C) float32.
        """
        return None

    def fused(self, projected: Tensor, tokens: Tensor, eps: float) -> Tensor | None:
        """Returns the loss against whitened tokens by one kernel; None where there is none.

        Args:
            projected: (B, N, C), any float dtype.
            tokens: (B, N, C), the teacher's, not whitened.
            eps: Added to the variance of a token.
        """
        return None


class SmoothL1(Loss):
    """Quadratic below `beta`, linear above; the mean over tokens and channels.

    Source: Wei et al., arXiv 2205.14141.
    """

    label = "smooth L1 loss"

    def __call__(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns the mean over tokens and channels."""
        return F.smooth_l1_loss(projected, target, beta=self.beta)

    def total(self, projected: Tensor, target: Tensor) -> tuple[Tensor, int]:
        """Returns the sum over tokens and channels, and their number."""
        total = F.smooth_l1_loss(projected, target, beta=self.beta, reduction="sum")
        return total, target.numel()

    def newton(self, constant: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Returns slope and curvature of the sum, which is convex."""
        difference = constant - target
        inside = difference.abs() < self.beta
        slope = difference.clamp(-self.beta, self.beta) / self.beta
        return slope.sum(0), inside.float().sum(0) / self.beta

    def fused(self, projected: Tensor, tokens: Tensor, eps: float) -> Tensor:
        """Returns the loss by the fused kernel, or by its plain twin."""
        return whitened_loss(projected, tokens, beta=self.beta, eps=eps)


LOSSES: dict[str, Any] = {"smooth_l1": SmoothL1}
"""The built-in losses: functions, or subclasses of `Loss`."""


def make_loss(name: str, *, beta: float) -> Loss:
    """Returns the loss that a recipe names.

    Args:
        name: A name in `LOSSES`, or one of the user's own (fd_large/doors.py).
        beta: `objective.beta`.

    Raises: ConfigError: if there is no such loss, or it cannot be made.
    """
    found = doors.load(name, kind="losses", where=WHERE, built_in=LOSSES)
    if not (isinstance(found, type) and issubclass(found, Loss)):
        return FunctionLoss(found)
    try:
        return found(beta)
    except Exception as error:  # The user's code may raise anything.
        raise ConfigError(
            f"{WHERE}: {name} cannot be made; got {doors.cause(error)}, expected a Loss from a "
            "call with beta. Correct the class."
        ) from error


def check_loss(loss: Loss, name: str) -> None:
    """Calls a loss on a few tokens and takes its gradient.

    Raises: ConfigError: if that fails, or gives no finite scalar.
    """
    generator = torch.Generator().manual_seed(0)
    with torch.enable_grad():
        projected, target = torch.randn(2, 2, 3, 8, generator=generator).unbind()
        projected.requires_grad_()
        try:
            value = loss(projected, target)
            got = f"a tensor of shape {tuple(value.shape)} and type {value.dtype}"
            fits = value.ndim == 0 and value.dtype == torch.float32
            if fits:
                (slope,) = torch.autograd.grad(value, projected)
                fits = bool(value.isfinite() and slope.isfinite().all())
        except Exception as error:  # The user's code may raise anything.
            got, fits = doors.cause(error), False
    if not fits:
        raise ConfigError(
            f"{WHERE}: {name} does not work on tokens (2, 3, 8); got {got}, expected a finite "
            "float32 scalar with a gradient. Correct the function: it takes (projected, target)."
        )


class FunctionLoss(Loss):
    """A loss that is a function alone."""

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function
        words = getattr(function, "__name__", "own").replace("_", " ")
        self.label = words if words.endswith("loss") else f"{words} loss"

    def __call__(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns what the function does."""
        return self._function(projected, target)
