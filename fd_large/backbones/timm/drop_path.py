"""Drop path of timm's models, driven by rows of `keep` in place of torch's generator.

Each `DropPath` is replaced by a `Kept`, which has no parameters, so that names stay timm's. The
block that contains a `Kept` gets the factors of the present forward as an argument, as this
package's own blocks do, so that a recomputation of the block in backward uses the same factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from torch import Tensor, nn


class Scales:
    """The drop-path factors of the present forward, shared by all `Kept` modules of a model.

    Attributes:
        now: (num_branches, B) float32, the factors; None without drop path.
    """

    now: Tensor | None = None


class Kept(nn.Module):
    """Multiplies a residual branch by its drop-path factors, one for each image.

    Args:
        scales: The drop-path factors of the model.
        rows: Rows of the factors that the calls in one forward of the block use, in order.
        scales_by_keep: Whether kept branches are divided by the probability of keeping them; if
            not, they stay unchanged.
    """

    def __init__(self, scales: Scales, rows: Sequence[int], *, scales_by_keep: bool):
        super().__init__()
        self.scales, self.rows, self.scales_by_keep = scales, tuple(rows), scales_by_keep
        self.calls = 0

    def forward(self, x: Tensor) -> Tensor:
        """Multiplies `x` by the factors of its images, and keeps its shape, (B', ...).

        B' is a multiple of B, the number of images. All entries of an image along this axis are
        adjacent. Without drop path, `x` is returned.
        """
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
    """Makes a block take the model's drop-path factors as an argument of each forward.

    Each forward of the block makes the block's `Kept` modules start again at their first row of the
    factors. The block's class is replaced by a subclass, because activation checkpointing calls the
    forward of either the module or the module's class.

    Args:
        block: The block.
        scales: The drop-path factors of the model.
        sites: The `Kept` modules in the block.
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
