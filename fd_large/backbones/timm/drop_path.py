"""Drop path of timm's models, driven by rows of `keep` in place of torch's generator.

Each `DropPath` is replaced by a `Kept`, which has no parameters, so that names stay timm's. The
block that owns it gets the factors of the present forward as an argument, as this package's own
blocks do, so that recomputation of the block for backward uses the same factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn


class Scales:
    """The drop path scales of a forward, shared by all sites of a model.

    Attributes:
        now: The factors of the forward under way, (num_sites, B) float32; None without drop path.
    """

    now: Tensor | None = None


class Kept(nn.Module):
    """Multiplies a residual branch by its row of the drop-path factors.

    Args:
        scales: The model's factors.
        rows: The row of each call in a forward of its block.
        scales_by_keep: Whether kept branches are divided by the probability of keeping them.
    """

    def __init__(self, scales: Scales, rows: Sequence[int], *, scales_by_keep: bool):
        super().__init__()
        self.scales, self.rows, self.scales_by_keep = scales, tuple(rows), scales_by_keep
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Maps (B', ...) to the same shape; B' is a multiple of B, samples outermost."""
        if self.scales.now is None:
            return x
        row = self.scales.now[self.rows[self.calls]]
        self.calls += 1
        if not self.scales_by_keep:
            row = row.sign()
        if len(x) != len(row):
            row = row.repeat_interleave(len(x) // len(row))
        return x * row.to(x.dtype).view(-1, *[1] * (x.dim() - 1))


def give_scales(block: nn.Module, scales: Scales, sites: Sequence[Kept]) -> None:
    """Passes the model's factors to a block, whose sites begin each forward with their first row.

    The block gets a subclass of its class, because wrappers for activation checkpointing call the
    forward of either the module or its class.
    """
    block._kept_sites, block._keep_scales = list(sites), scales
    block.__class__ = _with_scales(type(block))

    def argument(
        _: nn.Module, args: tuple[Any, ...], named: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        return args, {**named, "keep_scales": scales.now}

    block.register_forward_pre_hook(argument, with_kwargs=True)


@cache
def _with_scales(cls: type[nn.Module]) -> type[nn.Module]:
    def forward(self: Any, *args: Any, keep_scales: Tensor | None = None, **named: Any) -> Any:
        self._keep_scales.now = keep_scales
        for site in self._kept_sites:
            site.calls = 0
        return cls.forward(self, *args, **named)

    return type(cls.__name__, (cls,), {"forward": forward, "__module__": cls.__module__})
