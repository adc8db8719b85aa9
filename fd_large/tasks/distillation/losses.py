"""The losses between the student's projected tokens and the teacher's normalised tokens.

To add a loss, add a line in `LOSSES`, or write a file and name it by `objective.loss
module:FILE.py:NAME`. A loss is a function of (projected, target), both (B, N, C) float32, that
returns the mean over all tokens or images as a scalar, or it is a subclass of `Loss`. A recipe can
also name a weighted sum of built-in losses, such as "0.9 cosine + 0.1 smooth_l1".

The loss of a micro-batch is the mean over its images, and the loss of an image depends on this
image alone, so that the numbers of ranks and of micro-batches do not change a step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_large import doors
from fd_large.errors import ConfigError
from fd_large.kernels.whitened_loss import whitened_loss
from fd_large.tasks.distillation.section import Objective, is_sum, loss_terms

WHERE = "objective.loss"
_SMALLEST = 1e-6  # For divisions, far below any difference that matters in units of the target.


class Loss:
    """Base class of losses, which have a value for each image and a label for plots.

    Args:
        beta: `objective.beta`; a loss with `reads_beta` False ignores it.

    Attributes:
        label: Label in logs and plots.
        reads_beta: Whether the loss uses `beta`. If not, a recipe must not set `objective.beta`.
        reads_temperature: Whether the loss uses `temperature`. If not, a recipe must not set
            `objective.temperature`.
        temperature: `objective.temperature`, which `make_loss` sets after construction.
        of_tokens: Whether the loss is a mean over the losses of single tokens (`per_token`).
        in_sums: Whether a weighted sum of losses may have the loss as a term.
    """

    label = "loss"
    reads_beta = True
    reads_temperature = of_tokens = False
    temperature = Objective.temperature
    in_sums = True
    # Number of prefix tokens among those that are compared; the target sets it.
    num_prefix_tokens = 0

    def __init__(self, beta: float = 2.0) -> None:
        self.beta = beta

    def begin(self, teacher: str, kind: str, *, width: int, normaliser: str) -> None:
        """Prepares the loss for its target; the method of this base class does nothing.

        The target calls this method once.

        Args:
            teacher: The teacher's name, or "" for a single teacher.
            kind: "map" or "summary".
            width: Number of channels of the target's tokens.
            normaliser: Name of the normaliser of the teacher's tokens.

        Raises: ConfigError: if the loss does not work on this kind of target or normaliser.
        """

    def __call__(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns the loss, a scalar.

        Args:
            projected: (B, N, C) float32, the student's tokens after the head.
            target: (B, N, C) float32, the teacher's tokens after the normaliser; takes no gradient.
        """
        raise NotImplementedError

    def per_image(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of each image, (B,); the mean over images is the result of `__call__`.

        Args:
            projected, target: See `__call__`.
        """
        pairs = zip(projected.split(1), target.split(1), strict=True)
        return torch.stack([self(ours, theirs) for ours, theirs in pairs])

    def per_token(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns the loss of each token, (B, N); called only if `of_tokens` is True.

        Args:
            projected, target: See `__call__`.
        """
        tokens = (each.flatten(0, 1)[:, None] for each in (projected, target))
        return self.per_image(*tokens).view(projected.shape[:2])

    def newton(self, constant: Tensor, target: Tensor) -> tuple[Tensor, Tensor] | None:
        """Returns the loss's slope and curvature at a constant prediction, or None.

        A Newton step subtracts slope / curvature from the prediction, and leaves channels with
        curvature 0 unchanged. Such a step must not overshoot the minimum of the loss. If the result
        is None, the constant-prediction baseline predicts the mean of the targets.

        Args:
            constant: (C,) float32, the prediction for every token.
            target: (B, N, C) float32.

        Returns: slope and curvature, (C,) each, summed over the images.
        """
        return None

    def fused(self, projected: Tensor, tokens: Tensor, eps: float) -> Tensor | None:
        """Returns the loss, a scalar, by a kernel that fuses it with whitening.

        The result is None if the loss has no such kernel.

        Args:
            projected: (B, N, C), the student's tokens after the head, of any floating-point dtype.
            tokens: (B, N, C), the teacher's tokens before whitening.
            eps: Constant that whitening adds to the variance of a token.
        """
        return None


class SmoothL1(Loss):
    """The mean of smooth L1 over tokens and channels.

    Smooth L1 is quadratic in differences below `beta`, and linear in differences above `beta`.
    Source: Wei et al., arXiv 2205.14141.
    """

    label = "smooth L1 loss"
    of_tokens = True

    def __call__(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns the mean smooth L1 over tokens and channels, a scalar.

        Args:
            projected, target: (B, N, C) each; see `Loss.__call__`.
        """
        return F.smooth_l1_loss(projected, target, beta=self.beta)

    def per_image(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns the mean smooth L1 over the tokens and channels of each image, (B,).

        Args:
            projected, target: (B, N, C) each; see `Loss.__call__`.
        """
        return F.smooth_l1_loss(projected, target, beta=self.beta, reduction="none").mean((1, 2))

    def newton(self, constant: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the slope of the loss, and the curvature of parabolas above it, (C,) each.

        The parabolas touch the loss at the prediction `constant` and are nowhere below the loss.
        The second derivative is not used, since it is 0 for differences above `beta`: if most
        differences were above `beta`, a Newton step would lead far beyond the minimum.

        Args:
            constant, target: (C,) and (B, N, C); see `Loss.newton`.
        """
        difference = (constant - target).flatten(0, -2)
        slope = difference.clamp(-self.beta, self.beta) / self.beta
        curvature = difference.abs().clamp(min=self.beta).reciprocal()
        scale = len(target) / target.numel()
        return slope.sum(0) * scale, curvature.sum(0) * scale

    def fused(self, projected: Tensor, tokens: Tensor, eps: float) -> Tensor:
        """Returns the loss on whitened teacher tokens, a scalar, by a fused kernel.

        Where the kernel cannot run, plain torch computes the loss.

        Args:
            projected, tokens: (B, N, C) each; see `Loss.fused`.
            eps: Constant that whitening adds to the variance of a token.
        """
        return whitened_loss(projected, tokens, beta=self.beta, eps=eps)


class MeanSquaredError(Loss):
    """The mean of the squared difference over tokens and channels."""

    label = "mean squared error"
    reads_beta, of_tokens = False, True

    def __call__(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns the mean squared difference over tokens and channels, a scalar.

        Args:
            projected, target: (B, N, C) each; see `Loss.__call__`.
        """
        return F.mse_loss(projected, target)

    def per_image(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns the mean squared difference over the tokens and channels of each image, (B,).

        Args:
            projected, target: (B, N, C) each; see `Loss.__call__`.
        """
        return F.mse_loss(projected, target, reduction="none").mean((1, 2))

    def newton(self, constant: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the first and the second derivative of the loss by `constant`, (C,) each.

        Both are sums over the images.

        Args:
            constant, target: (C,) and (B, N, C); see `Loss.newton`.
        """
        slope = 2 / constant.numel() * (constant - target).mean(-2).sum(0)
        return slope, torch.full_like(constant, 2 / constant.numel() * len(target))


class L1(Loss):
    """The mean of the absolute difference over tokens and channels."""

    label = "L1 loss"
    reads_beta, of_tokens = False, True

    def __call__(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns the mean absolute difference over tokens and channels, a scalar.

        Args:
            projected, target: (B, N, C) each; see `Loss.__call__`.
        """
        return F.l1_loss(projected, target)

    def per_image(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns the mean absolute difference over the tokens and channels of each image, (B,).

        Args:
            projected, target: (B, N, C) each; see `Loss.__call__`.
        """
        return F.l1_loss(projected, target, reduction="none").mean((1, 2))

    def newton(self, constant: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the slope of the loss, and the curvature of parabolas above it, (C,) each.

        The parabolas touch the loss at the prediction `constant` and are nowhere below the loss.
        Steps of slope / curvature are those of iteratively reweighted least squares, and lead
        towards the median of the targets.

        Args:
            constant, target: (C,) and (B, N, C); see `Loss.newton`.
        """
        difference = (constant - target).flatten(0, -2)
        scale = len(target) / target.numel()
        curvature = difference.abs().clamp(min=_SMALLEST).reciprocal().sum(0)
        return difference.sign().sum(0) * scale, curvature * scale


class Cosine(Loss):
    """One minus the mean over tokens of the cosine between a student's and a teacher's token."""

    label = "cosine loss"
    reads_beta, of_tokens = False, True

    def __call__(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns one minus the mean cosine over tokens, a scalar.

        Args:
            projected, target: (B, N, C) each; see `Loss.__call__`.
        """
        return 1 - F.cosine_similarity(projected, target, dim=-1).mean()

    def per_image(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns one minus the mean cosine over the tokens of each image, (B,).

        Args:
            projected, target: (B, N, C) each; see `Loss.__call__`.
        """
        return 1 - F.cosine_similarity(projected, target, dim=-1).mean(1)

    def newton(self, constant: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a slope and curvature, (C,) each, for a step to the best constant prediction.

        A single step of slope / curvature leads to the best direction. The norm of the prediction
        has no effect on the loss.

        Args:
            constant, target: (C,) and (B, N, C); see `Loss.newton`.
        """
        directions = F.normalize(target, dim=-1).mean(-2).sum(0)
        return _towards(constant, directions)


class CosineOfMap(Loss):
    """One minus the mean over images of the cosine between two maps, each as a single vector.

    Unlike in `Cosine`, tokens of larger norm have more weight. Source: the code of Shang et al.
    (Theia), arXiv 2407.20179, and of Lu et al. (SAK), arXiv 2410.14633.
    """

    label = "map cosine loss"
    reads_beta = False

    def __call__(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns one minus the mean over images of the cosine between two maps, a scalar.

        Args:
            projected, target: (B, N, C) each; see `Loss.__call__`.
        """
        return 1 - F.cosine_similarity(projected.flatten(1), target.flatten(1), dim=-1).mean()

    def per_image(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns one minus the cosine between the two maps of each image, (B,).

        Args:
            projected, target: (B, N, C) each; see `Loss.__call__`.
        """
        return 1 - F.cosine_similarity(projected.flatten(1), target.flatten(1), dim=-1)

    def newton(self, constant: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Returns a slope and curvature, (C,) each, for a step to the best constant prediction.

        A single step of slope / curvature leads to the best direction. The norm of the prediction
        has no effect on the loss.

        Args:
            constant, target: (C,) and (B, N, C); see `Loss.newton`.
        """
        units = F.normalize(target.flatten(1), dim=-1).view_as(target)
        directions = units.sum((0, 1)) / math.sqrt(target.shape[1])
        return _towards(constant, directions)


class WeightedSum(Loss):
    """A weighted sum of losses.

    Args:
        terms: (weight, loss) of each term.
    """

    def __init__(self, terms: Sequence[tuple[float, Loss]]) -> None:
        super().__init__()
        self.terms = tuple(terms)
        words = (f"{weight:g} x {loss.label.replace(' loss', '')}" for weight, loss in terms)
        self.label = f"{' + '.join(words)} loss"
        self.reads_beta = any(loss.reads_beta for _, loss in terms)
        self.reads_temperature = any(loss.reads_temperature for _, loss in terms)
        self.of_tokens = all(loss.of_tokens for _, loss in terms)

    def begin(self, teacher: str, kind: str, **names: Any) -> None:
        """Calls `begin` of each loss in the sum with the same arguments; see `Loss.begin`."""
        for _, loss in self.terms:
            loss.begin(teacher, kind, **names)

    def __call__(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns the weighted sum of the losses, a scalar.

        Args:
            projected, target: (B, N, C) each; see `Loss.__call__`.
        """
        losses = [weight * loss(projected, target) for weight, loss in self._terms()]
        return torch.stack(losses).sum()

    def per_image(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns for each image the weighted sum of the losses, (B,).

        Args:
            projected, target: (B, N, C) each; see `Loss.__call__`.
        """
        losses = [weight * loss.per_image(projected, target) for weight, loss in self._terms()]
        return torch.stack(losses).sum(0)

    def _terms(self) -> tuple[tuple[float, Loss], ...]:
        """Returns `terms`, the (weight, loss) pairs, and sets `num_prefix_tokens` of each loss."""
        for _, loss in self.terms:
            loss.num_prefix_tokens = self.num_prefix_tokens
        return self.terms

    def newton(self, constant: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Returns the weighted sums of the losses' slopes and of their curvatures, (C,) each.

        A loss whose `newton` returns None is left out.

        Args:
            constant, target: (C,) and (B, N, C); see `Loss.newton`.
        """
        slope, curvature = torch.zeros_like(constant), torch.zeros_like(constant)
        for weight, loss in self.terms:
            if (part := loss.newton(constant, target)) is not None:
                slope, curvature = slope + weight * part[0], curvature + weight * part[1]
        return slope, curvature


class ClsAndPatches(Loss):
    """Mean of the loss on the CLS token and the loss on the patches.

    Both are the weighted sum of `Cosine` and `SmoothL1`. Therefore the CLS token has as much weight
    as all patches together; registers are left out. Without a CLS token only the loss on the
    patches counts. Source: Sariyildiz et al. (UNIC), arXiv 2408.05088, and Sariyildiz et al.
    (DUNE), arXiv 2503.14405, whose beta is 1.

    Args:
        beta: See `Loss`.
        cosine: Weight of `Cosine`.
        smooth_l1: Weight of `SmoothL1`.
    """

    label = "CLS and patch loss"

    def __init__(self, beta: float = 2.0, *, cosine: float = 0.5, smooth_l1: float = 0.5) -> None:
        super().__init__(beta)
        self._loss = WeightedSum([(cosine, Cosine()), (smooth_l1, SmoothL1(beta))])

    def __call__(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns the mean of `per_image` over the images, a scalar.

        Args:
            projected, target: (B, N, C) each; see `Loss.__call__`.
        """
        return self.per_image(projected, target).mean()

    def per_image(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns for each image the mean of the losses on the CLS token and on the patches, (B,).

        Without a CLS token the result is the loss on the patches.

        Args:
            projected, target: (B, N, C) each; see `Loss.__call__`.
        """
        kinds = zip(self._kinds(projected), self._kinds(target), strict=True)
        return torch.stack([self._loss.per_image(*kind) for kind in kinds]).mean(0)

    def newton(self, constant: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
        """Returns slope and curvature, (C,) each, as means of those on CLS token and on patches.

        Args:
            constant, target: (C,) and (B, N, C); see `Loss.newton`.
        """
        derivatives = [
            torch.stack(self._loss.newton(constant, kind)) for kind in self._kinds(target)
        ]
        slope, curvature = torch.stack(derivatives).mean(0)
        return slope, curvature

    def _kinds(self, tokens: Tensor) -> list[Tensor]:
        """Returns [CLS token (B, 1, C), patches] of `tokens`, (B, N, C).

        Without prefix tokens the result is [patches]. Other prefix tokens (registers) are left out.
        """
        patches = tokens[:, self.num_prefix_tokens :]
        return [tokens[:, :1], patches] if self.num_prefix_tokens else [patches]


LOSSES: dict[str, Any] = {
    "smooth_l1": SmoothL1,
    "mse": MeanSquaredError,
    "l1": L1,
    "cosine": Cosine,
    "cosine_of_map": CosineOfMap,
    "cls_and_patches": ClsAndPatches,
}
"""The built-in losses by name, each a function or a subclass of `Loss`."""


def make_loss(
    name: str,
    *,
    beta: float,
    temperature: float = Loss.temperature,
    known: Mapping[str, Any] = LOSSES,
) -> Loss:
    """Returns the loss that a recipe names.

    Args:
        name: A name in `known`, the user's own `module:FILE.py:NAME` (fd_large/doors.py), or a
            weighted sum of names in `known`.
        beta, temperature: `objective.beta` and `objective.temperature`.
        known: Built-in losses by name.

    Raises: ConfigError: if the loss does not exist or cannot be made.
    """
    if is_sum(name):
        names = [name for name in known if getattr(known[name], "in_sums", True)]
        terms = loss_terms(name, names)
        make_term = partial(make_loss, beta=beta, temperature=temperature, known=known)
        return WeightedSum([(weight, make_term(term)) for weight, term in terms])
    function_or_class = doors.load(name, kind="losses", where=WHERE, built_in=known)
    if not (isinstance(function_or_class, type) and issubclass(function_or_class, Loss)):
        return FunctionLoss(function_or_class)
    try:
        loss: Loss = function_or_class(beta)
    except Exception as error:  # The user's code may raise anything.
        raise ConfigError(
            f"{WHERE}: {name} cannot be made; got {doors.cause(error)}, expected a Loss from a "
            "call with beta. Correct the class."
        ) from error
    loss.temperature = temperature
    return loss


def check_loss(loss: Loss, name: str) -> None:
    """Checks a loss by its value and its gradient on a few tokens.

    Args:
        loss: The loss.
        name: The loss's name in the recipe, for messages.

    Raises:
        ConfigError: if the call fails, if the value or the gradient is not finite, or if a plain
            function does not return the mean over the images.
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
            # A loss of a class of its own may have another way to count, as the queue does.
            is_mean = fits and isinstance(loss, FunctionLoss)
            pairs = zip(projected.detach().split(1), target.split(1), strict=True)
            alone = [loss(ours, theirs) for ours, theirs in pairs] if is_mean else []
        except Exception as error:  # The user's code may raise anything.
            got, fits = doors.cause(error), False
    if not fits:
        raise ConfigError(
            f"{WHERE}: {name} does not work on tokens (2, 3, 8); got {got}, expected a finite "
            "float32 scalar with a gradient. Correct the function: it takes (projected, target)."
        )
    mean = torch.stack(alone).mean() if alone else value
    if not torch.allclose(value, mean, rtol=1e-4, atol=1e-5):
        raise ConfigError(
            f"{WHERE}: {name} is not a mean over the images, so micro-batches and ranks would "
            f"change it; got {value.item():.4f} from two images and a mean of {mean.item():.4f} "
            "from each alone, expected the same. Return the mean of a loss of each image."
        )


class FunctionLoss(Loss):
    """A loss that a plain function computes.

    Args:
        function: Maps (projected, target), as in `Loss.__call__`, to a scalar.
    """

    reads_beta = False

    def __init__(self, function: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self._function = function
        words = getattr(function, "__name__", "own").replace("_", " ")
        self.label = words if words.endswith("loss") else f"{words} loss"

    def __call__(self, projected: Tensor, target: Tensor) -> Tensor:
        """Returns the result of the user's function, a scalar.

        Args:
            projected, target: (B, N, C) each; see `Loss.__call__`.
        """
        return self._function(projected, target)


# ------------------------------------------------------------------------------------------------


def _towards(constant: Tensor, directions: Tensor) -> tuple[Tensor, Tensor]:
    """Returns a slope and curvature, (C,) each, for a loss that is minus a sum of cosines.

    The cosines are between the constant prediction and unit vectors. Subtracting slope / curvature
    from the prediction keeps its norm, and gives it the direction of the sum of the unit vectors.

    Args:
        constant: (C,), the present prediction.
        directions: (C,), the sum of the unit vectors.
    """
    length, most = constant.norm().clamp(min=_SMALLEST), directions.norm()
    slope = (most * constant / length - directions) / length
    return slope, (most / length.square()).expand_as(constant)
