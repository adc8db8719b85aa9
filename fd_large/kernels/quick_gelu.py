"""OpenAI CLIP's approximation of GELU, x sigmoid(1.702 x).

Plain torch computes this approximation in three passes over the tensor, and torch.compile on GPUs
in a single pass. The exact GELU is a single pass in plain torch.

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
    """Returns x sigmoid(1.702 x) for x (B, ..., C) of any float dtype, in x's shape and dtype."""
    choice = choose.implementation("quick_gelu", x.device.type)
    return twin("quick_gelu", choice, quick_gelu_reference, x)(x)


def quick_gelu_reference(x: Tensor) -> Tensor:
    """Computes `quick_gelu` in plain torch, with the same argument and result."""
    return x * torch.sigmoid(1.702 * x)


choose.register("quick_gelu")
