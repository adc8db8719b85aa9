"""Whether a model draws random numbers; a student must not, because `keep` decides a step."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Draws(TorchDispatchMode):
    """Notes the names of operators that draw random numbers while it is on.

    Attributes:
        seen: The names.
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
