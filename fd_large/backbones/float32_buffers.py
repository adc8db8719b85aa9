"""Modules whose statistics stay in float32 when their weights are cast."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn


class Float32Buffers(nn.Module):
    """Module whose buffers keep their dtype when the module is cast to bfloat16 or float16.

    Running statistics change little in each step, and 16-bit numbers would round the change away.
    """

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        before = dict(self.named_buffers())
        super()._apply(fn, recurse)
        for name, buffer in before.items():
            moved = getattr(self, name)
            if moved.dtype in (torch.bfloat16, torch.float16):
                setattr(self, name, buffer.to(moved.device))
        return self
