"""Checks that a model's step depends on images, weights and `keep`, not on chance or ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils._python_dispatch import TorchDispatchMode

from fd_large.errors import ConfigError


def refuse_chance(net: nn.Module, name: str, *, where: str, has_groups: bool = False) -> None:
    """Checks that a user's own model or head has no dropout and no unsuitable batch norm.

    Args:
        net: The trained module.
        name: Name of the module in the recipe.
        where: Field that the user set, for messages.
        has_groups: Whether batch norms of torch and timm will normalise by groups
            (`batch_norm.adopt`). If True, those that have running statistics and a momentum are
            accepted; if False, no batch norm is accepted.

    Raises: ConfigError: naming the first module that is not accepted.
    """
    remedy = "use a norm of single images"
    if has_groups:
        remedy = "use torch's batch norms with a momentum and running statistics"
    for part, module in net.named_modules():
        draws = isinstance(module, _DropoutNd) and module.p > 0
        if draws or (isinstance(module, _BatchNorm) and not (has_groups and _is_known(module))):
            raise ConfigError(
                f"{where}: a module makes steps depend on rank, micro batch or resume; got "
                f"{type(module).__name__} {part!r} in {name}, expected no such module. Remove "
                "dropout (a student may use drop path by its argument `keep` instead), and "
                f"{remedy}."
            )


def _is_known(norm: _BatchNorm) -> bool:
    # A class of the user's own may compute something else.
    is_library = type(norm).__module__.partition(".")[0] in ("torch", "timm")
    return is_library and norm.running_mean is not None and norm.momentum is not None


class Draws(TorchDispatchMode):
    """Context that records the names of operators that draw random numbers.

    Attributes:
        seen: The names recorded so far.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[str] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and not self._is_still(func, args):
            self.seen.add(str(func))
        return func(*args, **(kwargs or {}))

    @staticmethod
    def _is_still(func: Any, args: Any) -> bool:
        # Fused attention draws if the probability of its dropout is above 0.
        is_attention = "scaled_dot_product" in str(func)
        return is_attention and not any(isinstance(a, float) and a > 0 for a in args[3:])
