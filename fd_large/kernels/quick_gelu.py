"""OpenAI CLIP's approximation of GELU, x sigmoid(1.702 x).

Plain torch needs three passes for it, torch.compile on GPUs a single one. The exact GELU is a
single pass in torch.

Source: Hendrycks and Gimpel, arXiv 1606.08415, section 2.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fd_large.kernels import choose
from fd_large.kernels.check import checked
from fd_large.kernels.operation import twin


@checked
def quick_gelu(x: Tensor) -> Tensor:
    """Applies x sigmoid(1.702 x); (B, ..., C) of any float dtype to the same."""
    choice = choose.implementation("quick_gelu", x.device.type)
    return twin("quick_gelu", choice, quick_gelu_reference, x)(x)


def quick_gelu_reference(x: Tensor) -> Tensor:
    """Computes `quick_gelu` in plain torch."""
    return x * torch.sigmoid(1.702 * x)


choose.register("quick_gelu")
