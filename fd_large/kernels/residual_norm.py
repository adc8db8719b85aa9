"""LayerNorm, and x + scale * LayerNorm(branch): norms and residual sums of SwinV2's blocks.

Statistics are always float32 (float64 in a float64 run). Under ZeRO-3 a weight is whole only inside
its own module's forward, so the modules that own these weights call the functions here.

The file begins with the functions for models. Then come the plain torch versions of these functions
(`..._reference`), the operation that launches the kernels of `residual_norm_triton.py`, the
gradients of the operation, and functions that `add_norm.py` uses too. `choose.py` selects the
implementation.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fd_large.kernels import choose
from fd_large.kernels.check import checked
from fd_large.kernels.operation import blocks, check_shapes, launch, operation, twin


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
        dtype: Data type of the result; None for the data type of x.

    Returns: (..., C).
    """
    dtype = dtype or x.dtype
    choice = implementation("layer_norm", x, stream=dtype, weight=weight.dtype)
    if choice == "triton":
        return _fused(None, x, weight, bias, None, None, eps, dtype, None)[0]
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
    """Applies LayerNorm to the residual stream, and returns the result in two data types.

    The kernel writes the two results in one pass.

    Args:
        x: (B, ..., C), any float dtype.
        weight: (C,).
        bias: (C,).
        eps: Added to the variance.
        dtype: Data type of the first result; None for the data type of x.
        copy: Data type of the second result.

    Returns: LayerNorm(x) (B, ..., C) in `dtype`, and the same in `copy`.
    """
    dtype = dtype or x.dtype
    choice = implementation("residual_norm", x, stream=dtype, weight=weight.dtype, copy=copy)
    if choice == "triton":
        return _fused(None, x, weight, bias, None, None, eps, dtype, copy)
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
        x: (B, ..., C), the residual stream.
        branch: (B, ..., C), any float dtype.
        weight: (C,).
        bias: (C,).
        eps: Added to the variance.
        scale: (B,) float32, drop path's factor per sample, takes no gradient; None means 1.
        copy: Data type of the second result; None for the data type of x.
        branch_bias: (C,), the bias of the branch's last layer. This function adds the bias, before
            the norm, in place of that layer, so that the bias's gradient needs no separate pass
            (`takes_bias`). None for no bias.

    Returns: the sum (B, ..., C) in the dtype of x, and the sum in the dtype `copy`, written in the
        same pass. If the dtypes are equal, the two results share memory.
    Raises: ShapeError: if branch, weight, bias, branch_bias or scale does not fit the shape of x.
    """
    vectors = {"weight": weight, "bias": bias, "branch_bias": branch_bias}
    check_stream("residual_norm", x, branch, scale, **vectors)
    choice = implementation(
        "residual_norm",
        branch,
        stream=x.dtype,
        weight=weight.dtype,
        copy=copy or x.dtype,
        biased=branch_bias is not None,
    )
    if choice == "triton":
        return _fused(x, branch, weight, bias, branch_bias, scale, eps, x.dtype, copy)
    norm = twin("residual_norm", choice, residual_norm_reference, x, branch, scale)
    return norm(x, branch, weight, bias, eps, scale, branch_bias, copy)


def takes_bias(branch: Tensor, width: int) -> bool:
    """Whether `residual_norm` should add the bias of a branch's last layer, in place of this layer.

    This is so if `residual_norm` runs on its Triton kernel.

    Args:
        branch: Input of the branch's last layer.
        width: C, the number of channels of this layer's output.
    """
    return implementation("residual_norm", branch, width=width, biased=True) == "triton"


def _fused(
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
    inputs = (x, branch, weight, bias, branch_bias, factors(scale), eps, dtype, narrow)
    if copy == dtype and torch.is_grad_enabled() and not torch.compiler.is_compiling():
        y, copied, _, _ = Twice.apply(*inputs)
        return y, copied
    y, copied, _, _ = residual_norm_forward(*inputs)
    return y, y if narrow is None else copied


def layer_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype
) -> Tensor:
    """Computes `layer_norm` in plain torch, with the same arguments and result.

    `dtype` must be given.
    """
    if x.dtype == weight.dtype == dtype:
        # The kernels behind this call keep float32 statistics for half-precision inputs.
        return F.layer_norm(x, weight.shape, weight, bias, eps)
    return _wide_layer_norm(x, weight, bias, eps).to(dtype)


def stream_norm_reference(
    x: Tensor, weight: Tensor, bias: Tensor, eps: float, dtype: torch.dtype, copy: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Computes `stream_norm` in plain torch, with the same arguments and results.

    `dtype` must be given.
    """
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
    """Computes `residual_norm` in plain torch, with the same arguments and results.

    Norm, scale and sum are computed in float32, and the sum is rounded once.
    """
    if branch_bias is not None:
        branch = branch.to(torch.promote_types(branch.dtype, torch.float32)) + branch_bias
    normed = _wide_layer_norm(branch, weight, bias, eps)
    if scale is not None:
        normed = normed * scale.view(-1, *[1] * (x.dim() - 1)).to(normed.dtype)
    y = (x + normed).to(x.dtype)
    return y, y if copy is None else y.to(copy)


def _wide_layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    wide = torch.promote_types(x.dtype, torch.float32)
    return F.layer_norm(x.to(wide), weight.shape, weight.to(wide), bias.to(wide), eps)


@operation("residual_norm")
def residual_norm_forward(
    x: Tensor | None,
    branch: Tensor,
    weight: Tensor,
    bias: Tensor,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    eps: float,
    dtype: torch.dtype,
    copy: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns y = x + scale * LayerNorm(branch + branch_bias), and statistics of the branch.

    Without x and scale, y is LayerNorm(branch + branch_bias).

    Args:
        x: (B, ..., C), the residual stream, or None.
        branch: (B, ..., C), any float dtype.
        weight: (C,), weight of the norm.
        bias: (C,), bias of the norm.
        branch_bias: (C,), the bias of the branch's last layer; None for no bias.
        scale: (B,) float32, drop path's factor per sample; None means 1.
        eps: Added to the variance.
        dtype: Data type of y.
        copy: Data type of a second copy of y; None for no copy.

    Returns: y in `dtype`, y in `copy` (empty if `copy` is None), and the mean and the 1/deviation
        of each row of branch + branch_bias, (rows,) float32.
    """
    rows, constants = rows_of(branch), tile(branch.shape[-1])
    y = torch.empty_like(branch, dtype=dtype)
    narrow = None if copy is None else torch.empty_like(branch, dtype=copy)
    mean, rstd = (branch.new_empty(rows, dtype=torch.float32) for _ in range(2))
    launch(
        "residual_norm_triton._residual_norm_forward", (blocks(rows, constants["ROWS"]),),
        x, branch, weight, bias, branch_bias, scale, y, narrow, mean, rstd, rows,
        rows // branch.shape[0], eps,
        **constants,
    )  # fmt: skip
    return y, narrow, mean, rstd


@operation("residual_norm_backward")
def residual_norm_backward(
    dy: Tensor | None,
    dcopy: Tensor | None,
    branch: Tensor,
    weight: Tensor,
    branch_bias: Tensor | None,
    scale: Tensor | None,
    mean: Tensor,
    rstd: Tensor,
    dx: torch.dtype | None,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of x, branch, weight, bias and branch_bias.

    The gradient of x is empty if `dx` is None, and that of branch_bias if `branch_bias` is None.

    Args:
        dy: (B, ..., C), the gradient of `residual_norm_forward`'s first result, or None.
        dcopy: (B, ..., C), the gradient of its second result, or None; not both are None.
        branch: (B, ..., C), as in `residual_norm_forward`, like the next three arguments.
        weight: (C,), weight of the norm.
        branch_bias: (C,), the bias of the branch's last layer; None for no bias.
        scale: (B,) float32, drop path's factor per sample; None means 1.
        mean: (rows,) float32, a result of `residual_norm_forward`.
        rstd: (rows,) float32, a result of `residual_norm_forward`.
        dx: Data type of the gradient of x, which is dy + dcopy; None if it is not needed.
    """
    rows = rows_of(branch)
    constants, tiles, programs = backward_launch(rows, branch.shape[-1])
    total = None if dx is None else torch.empty_like(branch, dtype=dx)
    dbranch = torch.empty_like(branch)
    vectors = weight, weight, branch_bias
    partials = [partial_sums(programs, vector) for vector in vectors]
    launch(
        "residual_norm_triton._residual_norm_backward", (programs,),
        dy, dcopy, branch, weight, branch_bias, scale, mean, rstd, total, dbranch, *partials, rows,
        rows // branch.shape[0], tiles, programs,
        **constants,
    )  # fmt: skip
    return total, dbranch, *map(summed, partials, vectors)


def _residual_norm_setup(ctx, inputs, output):
    x, branch, weight, _, branch_bias, scale, _, _, _ = inputs
    _, narrow, mean, rstd = output
    ctx.save_for_backward(branch, weight, branch_bias, scale, mean, rstd)
    ctx.stream = None if x is None else x.dtype
    ctx.mark_non_differentiable(mean, rstd, *(() if narrow.numel() else (narrow,)))
    # Otherwise an unused copy would cost a map of zeros.
    ctx.set_materialize_grads(False)


def _residual_norm_gradients(ctx, dy, dcopy, _mean, _rstd):
    if dy is None and dcopy is None:
        return (None,) * 9
    _, _, branch_bias, *_ = saved = ctx.saved_tensors
    # The gradient of a sum is that of its terms; it is written only if two gradients meet.
    both = dcopy is not None and ctx.stream is not None
    total, dbranch, dweight, dbias, dlast = residual_norm_backward(
        dy, dcopy, *saved, ctx.stream if both else None
    )
    dx = None if ctx.stream is None else total if both else dy
    return dx, dbranch, dweight, dbias, None if branch_bias is None else dlast, *(None,) * 4


residual_norm_forward.register_autograd(
    _residual_norm_gradients, setup_context=_residual_norm_setup
)


class Twice(torch.autograd.Function):
    """Calls `residual_norm_forward`, and returns the sum as two tensors over the same memory.

    The gradients of the two tensors are summed in the backward kernel. For a single tensor that is
    used twice, torch would sum them in a separate pass. A custom operation of torch may not return
    two tensors that share memory.
    """

    @staticmethod
    def forward(ctx, *inputs):
        """Returns the results of `residual_norm_forward` for `inputs`, with the sum twice.

        Returns: the sum x + scale * LayerNorm(branch + branch_bias); the same sum as another tensor
            over the same memory; the mean and the 1/deviation of each row of branch + branch_bias.
        """
        y, _, mean, rstd = residual_norm_forward(*inputs)
        output = y, y.detach(), mean, rstd
        _residual_norm_setup(ctx, inputs, output)
        return output

    backward = staticmethod(_residual_norm_gradients)


def implementation(
    op: str, branch: Tensor, *, width: int | None = None, **case: Any
) -> choose.Implementation:
    """Returns the implementation of an operation: `triton`, `compiled`, `apex` or `reference`.

    Args:
        op: A registered operation.
        branch: Tensor whose device, dtype and size decide.
        width: Number of channels of the norm; None for the number of channels of `branch`.
        case: Further values that decide whether kernels are tested, such as dtypes.
    """
    return choose.implementation(
        op,
        branch.device.type,
        width=width or branch.shape[-1],
        empty=not branch.numel(),
        branch=branch.dtype,
        **case,
    )


def check_stream(
    where: str, x: Tensor, branch: Tensor, scale: Tensor | None, **vectors: Tensor | None
) -> None:
    """Checks that the tensors of a call fit the residual stream `x` of shape (B, ..., C).

    Args:
        where: Name of the calling function, for the message.
        x: The residual stream.
        branch: Must have the shape of `x`.
        scale: Must have the shape (B,), or be None.
        vectors: Each must have the shape (C,), or be None.

    Raises: ShapeError: if a tensor has another shape.
    """
    check_shapes(
        where,
        f"the stream {tuple(x.shape)}",
        branch=(branch, x.shape),
        scale=(scale, x.shape[:1]),
        **{name: (vector, x.shape[-1:]) for name, vector in vectors.items()},
    )


def factors(scale: Tensor | None) -> Tensor | None:
    """Returns drop path's factors `scale` in float32, as the kernels need them; None for None."""
    return None if scale is None else scale.float()


# About one program for each of an H100's 132 multiprocessors. A backward has as many programs as
# partial rows, and fewer would leave memory bandwidth unused.
PARTIALS = 128
# Elements of a tile, 16 per thread, unless a row is longer.
_TILE = 4096


def rows_of(values: Tensor) -> int:
    """Returns the number of rows of `values`; a row runs along the last dimension."""
    return values.numel() // values.shape[-1]


def tile(width: int) -> dict[str, int]:
    """Returns the compile-time constants of a kernel for rows of `width` channels, 32 to 8192.

    Returns: {"C": `width`, "ROWS": the number of rows in a tile, "BLOCK": `width` rounded up to a
        power of 2, "num_warps": the number of warps of a program}.
    """
    block = 1 << (int(width) - 1).bit_length()
    rows = max(1, _TILE // block)
    return {"C": int(width), "ROWS": rows, "BLOCK": block, "num_warps": rows * block // 512}


def backward_launch(
    rows: int, width: int, layer_scale: bool = False
) -> tuple[dict[str, int], int, int]:
    """Returns what the launch of a backward kernel needs.

    Args:
        rows: Number of rows of the tensors.
        width: C, the number of channels of a row.
        layer_scale: Whether the kernel also reads the branch, for LayerScale's gradient.

    Returns: the compile-time constants; the number of tiles, each of a few rows; the number of
        programs, which share the tiles.
    """
    constants = tile(width)
    if width % 8:
        # Rows that cannot be loaded in vectors take more registers for addresses.
        constants["ROWS"] = max(1, constants["ROWS"] // 2)
    # The next tiles are loaded while one is worked on, as far as shared memory (163 KB on an A100)
    # and registers allow. With LayerScale four maps are loaded, else three.
    stages = 3 if constants["BLOCK"] <= (_TILE // 2 if layer_scale else _TILE) else 2
    constants["STAGES"] = stages if constants["BLOCK"] <= _TILE else 1
    # Twice the threads of a forward, because sums per channel stay in registers from tile to tile;
    # all registers that so many threads can have, because the compiler spills rather than use more
    # than half.
    constants["num_warps"], constants["maxnreg"] = 16, 128
    tiles = blocks(rows, constants["ROWS"])
    return constants, tiles, min(PARTIALS, tiles)


def partial_sums(programs: int, vector: Tensor | None) -> Tensor | None:
    """Returns uninitialised memory for partial sums of a vector's gradient.

    Args:
        programs: Number of programs, of which each writes a partial sum.
        vector: (C,), the vector; may be None.

    Returns: (programs, C) float32, or None if `vector` is None.
    """
    if vector is None:
        return None
    return vector.new_empty(programs, vector.shape[0], dtype=torch.float32)


def summed(partial: Tensor | None, vector: Tensor | None) -> Tensor | None:
    """Sums the partial sums of a vector's gradient.

    Args:
        partial: (programs, C), a partial sum of each program; may be None.
        vector: (C,), the vector.

    Returns: (C,), in the dtype of `vector`; None if `partial` is None.
    """
    return None if partial is None else partial.sum(0).to(vector.dtype)


_DTYPES = (torch.float32, torch.bfloat16)
_WIDTHS = range(32, 8193)
# With more channels, a program's registers do not hold three sums per channel, or the addresses of
# rows that cannot be read in vectors.
_WIDTHS_OF_THREE = range(32, 4097)
_ODD_WIDTHS = range(32, 2049)


def untested(
    *, width: int, empty: bool, biased: bool = False, gamma: bool = False, **dtypes: torch.dtype
) -> str:
    """Returns why the kernels are not tested in a case, or "" if they are tested.

    Args:
        width: C, the number of channels.
        empty: Whether the tensors have no elements.
        biased: Whether the kernels add the bias of the branch.
        gamma: Whether the kernels multiply the branch by LayerScale.
        dtypes: Data type of each tensor, by name.
    """
    if width not in _WIDTHS or (width % 8 and width not in _ODD_WIDTHS):
        return f"{width} channels"
    if (biased or gamma) and width not in _WIDTHS_OF_THREE:
        return f"{'LayerScale' if gamma else 'a bias of the branch'} of {width} channels"
    if empty:
        return "no rows"
    return ", ".join(f"{k} {v}" for k, v in dtypes.items() if v not in _DTYPES)


def _apex_untested(
    *, stream: torch.dtype, branch: torch.dtype, weight: torch.dtype, **case: Any
) -> str:
    return "" if stream == branch == weight else "mixed dtypes"


choose.register("layer_norm", untested, _apex_untested)
choose.register("residual_norm", untested)
