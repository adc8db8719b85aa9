"""A linear layer and its GELU: torch computes the product, and one pass each way what follows.

The pass adds the bias and applies the function; its backward gives the gradients of the product and
of the bias from one reading. Triton kernels are in `linear_gelu_triton.py`; `choose.py` decides
whether they or the plain twin run.

Source: Hendrycks and Gimpel, arXiv 1606.08415; the quick form is OpenAI CLIP's.
"""

from __future__ import annotations

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_large.kernels import choose
from fd_large.kernels.check import checked
from fd_large.kernels.operation import operation

Activation = Literal["gelu", "quick_gelu"]


@checked
def linear_gelu(
    x: Tensor, weight: Tensor, bias: Tensor, *, activation: Activation = "gelu"
) -> Tensor:
    """Applies a linear layer and its activation.

    Args:
        x: (..., in), dtype of the weight.
        weight: (out, in).
        bias: (out,).
        activation: "gelu", exact; "quick_gelu": z sigmoid(1.702 z).

    Returns: (..., out), dtype of the weight.
    """
    choice = choose.implementation(
        "linear_gelu",
        x.device.type,
        width=len(bias),
        empty=not x.numel(),
        product=weight.dtype,
        bias=bias.dtype,
    )
    if choice == "triton":
        product = F.linear(x, weight)
        return torch.ops.fd_large.bias_gelu(
            product.contiguous(), bias.contiguous(), activation == "quick_gelu"
        )
    return linear_gelu_reference(x, weight, bias, activation)


def linear_gelu_reference(
    x: Tensor, weight: Tensor, bias: Tensor, activation: Activation = "gelu"
) -> Tensor:
    """The plain twin of `linear_gelu`."""
    return ACTIVATIONS[activation](F.linear(x, weight, bias))


def quick_gelu(x: Tensor) -> Tensor:
    """OpenAI CLIP's approximation x sigmoid(1.702 x)."""
    return x * torch.sigmoid(1.702 * x)


ACTIVATIONS = {"gelu": F.gelu, "quick_gelu": quick_gelu}


def untested(*, width: int, empty: bool, **dtypes: torch.dtype) -> str:
    """Returns why the kernels were not tested in a case, or "" if they were."""
    if width < 32:
        return f"{width} channels"
    if empty:
        return "no rows"
    known = (torch.float32, torch.bfloat16)
    return ", ".join(f"{name} {dtype}" for name, dtype in dtypes.items() if dtype not in known)


choose.register("linear_gelu", untested)


# The activation of product + bias.
_bias_gelu = operation(
    "bias_gelu(Tensor product, Tensor bias, bool quick) -> Tensor",
    "linear_gelu_triton.forward",
    empty=lambda product, bias, quick: torch.empty_like(product),
)
# The gradients of the product and of the bias.
operation(
    "bias_gelu_backward(Tensor dout, Tensor product, Tensor bias, bool quick) -> (Tensor, Tensor)",
    "linear_gelu_triton.backward",
    empty=lambda dout, product, bias, quick: (torch.empty_like(product), torch.empty_like(bias)),
)


def _setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.quick = inputs[2]


def _gradients(ctx: Any, dout: Tensor) -> tuple[Tensor | None, ...]:
    dproduct, dbias = torch.ops.fd_large.bias_gelu_backward(
        dout.contiguous(), *ctx.saved_tensors, ctx.quick
    )
    return dproduct, dbias, None


_bias_gelu.register_autograd(_gradients, setup_context=_setup)
