"""What of each operation is compiled ahead of time: the shapes of the nets of record, and edges.

A case is a function that launches an operation's kernels, forward and backward, on the meta device;
`aot.usage` compiles each launch. benchmarks/kernels.py --aot writes the results down.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
# The narrowest and the widest that run, SwinV2-G's third stage, and widths that are no power of 2.
NORM_WIDTHS = (32, 768, 2048, 3000, 8192)


def norms(width: int, stream: torch.dtype, rows: int = 4608) -> None:
    """Launches the kernels of `residual_norm.py` with bfloat16 branches and weights."""
    from fd_large.kernels import residual_norm_triton as kernels

    x = _meta(2, rows // 2, width, dtype=stream)
    f = _meta(2, rows // 2, width, dtype=BFLOAT16)
    w, scale, statistics = _meta(width, dtype=BFLOAT16), _meta(2), _meta(rows)
    copy = BFLOAT16 if stream == FLOAT32 else None
    kernels.residual_norm_forward(x, f, w, w, scale, 1e-5, stream, copy)
    kernels.residual_norm_backward(
        x, None if copy is None else f, f, w, scale, statistics, statistics, copy and stream
    )
    # A plain norm from the stream to what the products take.
    kernels.residual_norm_forward(None, x, w, w, None, 1e-5, BFLOAT16, None)
    kernels.residual_norm_backward(f, None, x, w, None, statistics, statistics, None)
    gamma = w if width <= 4096 else None
    branch = None if gamma is None else f
    kernels.add_norm_forward(x, f, gamma, scale, w, w, 1e-5, BFLOAT16)
    kernels.add_norm_backward(x, f, x, branch, gamma, scale, w, statistics, statistics, BFLOAT16)
    kernels.add_norm_forward(x, f, gamma, scale, None, None, 0.0, stream)
    kernels.add_norm_backward(
        x, None, None, branch, gamma, scale, None, statistics, statistics, BFLOAT16
    )


def loss(width: int, dtype: torch.dtype, rows: int = 4608) -> None:
    """Launches the kernels of `whitened_loss.py`."""
    from fd_large.kernels import whitened_loss_triton as kernels

    student = _meta(2, rows // 2, width, dtype=dtype)
    teacher = _meta(2, rows // 2, width, dtype=BFLOAT16)
    kernels.whitened_loss_forward(student, teacher, 2.0, 1e-5)
    kernels.whitened_loss_backward(_meta(), student, teacher, _meta(rows), _meta(rows), 2.0)


def _meta(*shape: int, dtype: torch.dtype = FLOAT32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


CASES: dict[str, Callable[[], None]] = {
    **{
        f"residual_norm, {width} channels, {str(stream)[6:]} stream": partial(norms, width, stream)
        for width in NORM_WIDTHS
        for stream in (FLOAT32, BFLOAT16)
    },
    "residual_norm, 2048 channels, two rows": partial(norms, 2048, BFLOAT16, rows=2),
    **{
        f"whitened_loss, {width} channels, {str(dtype)[6:]}": partial(loss, width, dtype)
        for width in (768, 4096)
        for dtype in (FLOAT32, BFLOAT16)
    },
    "whitened_loss, 768 channels, two rows": partial(loss, 768, BFLOAT16, rows=2),
}
