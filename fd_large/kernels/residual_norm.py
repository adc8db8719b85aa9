"""Norms and residual sums: LayerNorm, x + scale * LayerNorm(branch), and LayerNorm(x + branch).

Statistics are always float32 (float64 in a float64 run). Under ZeRO-3 a weight is whole only inside
its own module's forward, so the modules that own these weights call the functions here.

Each function has a plain twin (`..._reference`) and operations over Triton kernels, launched in
`residual_norm_launch.py`; `choose.py` decides what runs.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_large.errors import ShapeError
from fd_large.kernels import choose
from fd_large.kernels.check import checked
from fd_large.kernels.compiled import twin
from fd_large.kernels.operation import contiguous
from fd_large.kernels.residual_norm_launch import Twice, add_norm_forward, residual_norm_forward


@checked
def layer_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Applies LayerNorm over the last dimension.

    Args:
        x: (..., C), any float dtype.
        weight: (C,).
        bias: (C,).
        eps: Added to the variance.
        dtype: Data type of the result; None: that of x.

    Returns: (..., C).
    """
    dtype = dtype or x.dtype
    choice = choose.implementation(
        "layer_norm",
        x.device.type,
        width=x.shape[-1],
        empty=not x.numel(),
        stream=dtype,
        branch=x.dtype,
        weight=weight.dtype,
    )
    if choice == "triton":
        return _launch(None, x, weight, bias, None, None, eps, dtype, None)[0]
    if choice == "apex":
        return choose.apex_layer_norm()(x, weight, bias, weight.shape, eps)
    norm = twin("layer_norm", choice, layer_norm_reference, x)
    return norm(x, weight, bias, eps, dtype)


@checked
def stream_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    *,
    dtype: torch.dtype | None = None,
    copy: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """Applies LayerNorm on the main path; one pass gives the result in `dtype` and in `copy`.

    Args and returns: as in `layer_norm` and `residual_norm`.
    """
    dtype = dtype or x.dtype
    choice = choose.implementation(
        "residual_norm",
        x.device.type,
        width=x.shape[-1],
        empty=not x.numel(),
        stream=dtype,
        branch=x.dtype,
        weight=weight.dtype,
        copy=copy,
    )
    if choice == "triton":
        return _launch(None, x, weight, bias, None, None, eps, dtype, copy)
    if choice == "compiled":
        norm = twin("residual_norm", choice, stream_norm_reference, x)
        return norm(x, weight, bias, eps, dtype, copy)
    # A separate choice, because apex's norm may run.
    y = layer_norm(x, weight, bias, eps, dtype=dtype)
    return y, y.to(copy)


@checked
def residual_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    *,
    copy: torch.dtype | None = None,
    branch_bias: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds a normalised branch to the residual stream: x + scale * LayerNorm(branch).

    Args:
        x: (B, ..., C), the stream; the result has its dtype.
        branch: (B, ..., C), any float dtype.
        weight: (C,).
        bias: (C,).
        eps: Added to the variance.
        scale: (B,) float32, drop path's factor per sample, takes no gradient; None: 1.
        copy: Data type of the second result; None: that of x.
        branch_bias: (C,), added to the branch before its norm: the bias of the branch's last layer,
            so that its gradient needs no pass of its own. See `takes_bias`.

    Returns: (B, ..., C) in the dtype of x, and the same in the dtype `copy`, written in the same
        pass (the same numbers in memory where the dtypes are equal).
    Raises: ShapeError: if branch, vectors or scale do not fit x.
    """
    _check("residual_norm", x, branch, scale, weight=weight, bias=bias, branch_bias=branch_bias)
    choice = choose.implementation(
        "residual_norm",
        x.device.type,
        width=x.shape[-1],
        empty=not x.numel(),
        stream=x.dtype,
        branch=branch.dtype,
        weight=weight.dtype,
        copy=copy or x.dtype,
        biased=branch_bias is not None,
    )
    if choice == "triton":
        return _launch(x, branch, weight, bias, branch_bias, scale, eps, x.dtype, copy)
    norm = twin("residual_norm", choice, residual_norm_reference, x, branch, scale)
    return norm(x, branch, weight, bias, eps, scale, branch_bias, copy)


def takes_bias(branch: Tensor, width: int) -> bool:
    """Returns whether a branch's last layer should leave its bias to `residual_norm`'s kernels.

    Args:
        branch: The input of that layer.
        width: C, channels of its output.
    """
    choice = choose.implementation(
        "residual_norm",
        branch.device.type,
        width=width,
        empty=not branch.numel(),
        branch=branch.dtype,
        biased=True,
    )
    return choice == "triton"


def _launch(
    x: Tensor | None,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    copy: torch.dtype | None,
) -> tuple[Tensor, Tensor]:
    narrow = None if copy == dtype else copy
    inputs = (
        None if x is None else x.contiguous(),
        branch.contiguous(),
        weight.contiguous(),
        bias.contiguous(),
        contiguous(branch_bias),
        _factors(scale),
        eps,
        dtype,
        narrow,
    )
    if copy == dtype and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        y, copied, _, _ = Twice.apply(*inputs)
        return y, copied
    y, copied, _, _ = residual_norm_forward(*inputs)
    return y, y if narrow is None else copied


@checked
def add_norm(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    gamma: Tensor | None = None,
    *,
    dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """Adds a pre-norm branch, y = x + scale * gamma * branch, and applies the next norm to y.

    Args:
        x: (B, ..., C), the stream.
        branch: (B, ..., C), any float dtype.
        weight: (C,), weight of the norm.
        bias: (C,), bias of the norm.
        eps: Added to the variance.
        scale: (B,) float32, drop path's factor per sample, takes no gradient; None: 1.
        gamma: (C,), LayerScale; None: 1.
        dtype: Data type of the normalised sum; None: that of x.

    Returns: y (B, ..., C) in the dtype of x, and its norm (B, ..., C).
    Raises: ShapeError: if branch, vectors or scale do not fit x.
    """
    _check("add_norm", x, branch, scale, weight=weight, bias=bias, gamma=gamma)
    dtype = dtype or x.dtype
    choice = _add_choice(x, branch, gamma, dtype, weight)
    if choice == "triton":
        y, normed, _, _ = add_norm_forward(
            x.contiguous(),
            branch.contiguous(),
            contiguous(gamma),
            _factors(scale),
            weight.contiguous(),
            bias.contiguous(),
            eps,
            dtype,
        )
        return y, normed
    if choice == "compiled":
        norm = twin("add_norm", choice, add_norm_reference, x, branch, scale)
        return norm(x, branch, weight, bias, eps, scale, gamma, dtype)
    y = add_branch_reference(x, branch, scale, gamma)
    # A separate choice, because a norm alone may run where the pair does not.
    return y, layer_norm(y, weight, bias, eps, dtype=dtype)


@checked
def add_branch(
    x: Tensor, branch: Tensor, scale: Tensor | None = None, gamma: Tensor | None = None
) -> Tensor:
    """Adds a pre-norm branch with no norm after it: x + scale * gamma * branch, in the dtype of x.

    Raises: ShapeError: if branch, gamma or scale do not fit x.
    """
    _check("add_branch", x, branch, scale, gamma=gamma)
    choice = _add_choice(x, branch, gamma, x.dtype, None)
    if choice == "triton":
        vectors = contiguous(gamma), _factors(scale), None, None
        return add_norm_forward(x.contiguous(), branch.contiguous(), *vectors, 0.0, x.dtype)[0]
    add = twin("add_norm", choice, add_branch_reference, x, branch, scale)
    return add(x, branch, scale, gamma)


def _check(
    where: str, x: Tensor, branch: Tensor, scale: Tensor | None, **vectors: Tensor | None
) -> None:
    """Checks shapes, because a kernel sees addresses only and would read past the end."""
    expected = {"branch": (branch, x.shape), "scale": (scale, x.shape[:1])}
    expected |= {name: (vector, x.shape[-1:]) for name, vector in vectors.items()}
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ShapeError(
                f"{where}: {name} does not fit the stream {tuple(x.shape)}; got "
                f"{tuple(tensor.shape)}, expected {tuple(shape)}. Pass one that does."
            )


def _factors(scale: Tensor | None) -> Tensor | None:
    return None if scale is None else scale.float().contiguous()


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """The plain twin of `layer_norm`."""
    if x.dtype == weight.dtype == dtype:
        # The kernels behind this call keep float32 statistics for half-precision inputs.
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return _wide_layer_norm(x, weight, bias, eps).to(dtype)


def stream_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, copy: torch.dtype
) -> tuple[Tensor, Tensor]:
    """The plain twin of `stream_norm`."""
    y = layer_norm_reference(x, weight, bias, eps, dtype)
    return y, y.to(copy)


def residual_norm_reference(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None = None,
    branch_bias: Tensor | None = None,
    copy: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """The plain twin of `residual_norm`: norm, scale and sum in float32, rounded once."""
    if branch_bias is not None:
        branch = branch.to(torch.promote_types(branch.dtype, torch.float32)) + branch_bias
    normed = _wide_layer_norm(branch, weight, bias, eps)
    if scale is not None:
        normed = normed * scale.view(-1, *[1] * (x.dim() - 1)).to(normed.dtype)
    y = (x + normed).to(x.dtype)
    return y, y if copy is None else y.to(copy)


def add_norm_reference(
    x: Tensor,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    eps: float,
    scale: Tensor | None,
    gamma: Tensor | None,
    dtype: torch.dtype,
) -> tuple[Tensor, Tensor]:
    """The plain twin of `add_norm`."""
    y = add_branch_reference(x, branch, scale, gamma)
    return y, layer_norm_reference(y, weight, bias, eps, dtype)


def add_branch_reference(
    x: Tensor, branch: Tensor, scale: Tensor | None = None, gamma: Tensor | None = None
) -> Tensor:
    """The plain twin of `add_branch`: summed in float32 and rounded once."""
    branch = branch.to(torch.promote_types(x.dtype, torch.float32))
    if gamma is not None:
        branch = branch * gamma.to(branch.dtype)
    if scale is not None:
        branch = branch * scale.view(-1, *[1] * (x.dim() - 1)).to(branch.dtype)
    return (x + branch).to(x.dtype)


def _wide_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)


# The tested cases; all others run on the reference.
_DTYPES = (torch.float32, torch.bfloat16)
_WIDTHS = range(32, 8193)
# With more channels, a program's registers do not hold three sums per channel, or the addresses of
# rows that cannot be read in vectors.
_WIDTHS_OF_THREE = range(32, 4097)
_ODD_WIDTHS = range(32, 2049)


def untested(*, width: int, empty: bool, **dtypes: torch.dtype) -> str:
    """Returns why the kernels were not tested in a case, or "" if they were."""
    if width not in _WIDTHS or (width % 8 and width not in _ODD_WIDTHS):
        return f"{width} channels"
    if empty:
        return "no rows"
    return ", ".join(f"{k} {v}" for k, v in dtypes.items() if v not in _DTYPES)


def _residual_untested(*, biased: bool = False, **case: Any) -> str:
    if biased and case["width"] not in _WIDTHS_OF_THREE:
        return f"a branch's bias of {case['width']} channels"
    return untested(**case)


def _add_untested(*, gamma: bool, **case: Any) -> str:
    if gamma and case["width"] not in _WIDTHS_OF_THREE:
        return f"LayerScale of {case['width']} channels"
    return untested(**case)


def _apex_untested(
    *, stream: torch.dtype, branch: torch.dtype, weight: torch.dtype, **case: Any
) -> str:
    return "" if stream == branch == weight else "mixed dtypes"


choose.register("layer_norm", untested, _apex_untested)
choose.register("residual_norm", _residual_untested)
choose.register("add_norm", _add_untested)


def _add_choice(
    x: Tensor, branch: Tensor, gamma: Tensor | None, dtype: torch.dtype, weight: Tensor | None
) -> choose.Implementation:
    return choose.implementation(
        "add_norm",
        x.device.type,
        width=x.shape[-1],
        empty=not x.numel(),
        stream=x.dtype,
        branch=branch.dtype,
        weight=torch.float32 if weight is None else weight.dtype,
        gamma=gamma is not None,
        normed=dtype,
    )
