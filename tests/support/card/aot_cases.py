"""What of each operation is compiled ahead of time: the shapes of the models of record, and edges.

Each of CASES is a function that launches an operation's kernels, forward and backward, on the meta
device; `aot.usage` compiles each launch. benchmarks/kernels.py --aot writes the results down.
COMPARED is what the attention's kernels are compared with the reference in.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

FLOAT32, BFLOAT16 = torch.float32, torch.bfloat16
# The narrowest and the widest that run, SwinV2-G's stages, ViT-B's, and one that is no power of 2.
NORM_WIDTHS = (32, 512, 768, 1024, 2048, 3000, 4096, 8192)
# Widths with most to hold: four maps of float32, three sums a channel, odd rows.
FLOAT32_WIDTHS = (1001, 2048, 4096, 8192)


def norms(
    width: int, stream: torch.dtype, rows: int = 4608, *, other: torch.dtype = BFLOAT16
) -> None:
    """Launches the kernels of both norms; branches, weights and copies have dtype `other`."""
    from fd_large.kernels.add_norm import add_norm_backward, add_norm_forward
    from fd_large.kernels.residual_norm import residual_norm_backward, residual_norm_forward

    x = _meta(2, rows // 2, width, dtype=stream)
    f = _meta(2, rows // 2, width, dtype=other)
    w, scale, statistics = _meta(width, dtype=other), _meta(2), _meta(rows)
    copy = other if stream != other else None
    # Three sums a channel run up to this width.
    last = gamma = w if width <= 4096 else None
    residual_norm_forward(x, f, w, w, last, scale, 1e-5, stream, copy)
    residual_norm_backward(x, f, f, w, last, scale, statistics, statistics, stream)
    # A norm on the stream, and a plain one from it to what the products take.
    residual_norm_forward(None, x, w, w, None, None, 1e-5, stream, copy)
    residual_norm_backward(x, f, x, w, None, None, statistics, statistics, None)
    if stream != other:
        residual_norm_forward(None, x, w, w, None, None, 1e-5, other, None)
        residual_norm_backward(f, None, x, w, None, None, statistics, statistics, None)
    branch = None if gamma is None else f
    add_norm_forward(x, f, gamma, scale, w, w, 1e-5, other)
    add_norm_backward(x, f, x, branch, gamma, scale, w, statistics, statistics, other)
    add_norm_forward(x, f, gamma, scale, None, None, 0.0, stream)
    add_norm_backward(x, None, None, branch, gamma, scale, None, statistics, statistics, other)


def attention(
    window: tuple[int, int],
    *,
    heads: int = 16,
    head_width: int = 32,
    shift: int = 0,
    prefix: int = 0,
    cosine: bool = True,
    table: bool = True,
    padded: bool = False,
    dtype: torch.dtype = BFLOAT16,
) -> None:
    """Launches the kernels of `window_attention.py`; shifted or padded maps have four windows."""
    from fd_large.kernels import window_attention_launch as kernels

    batch, side = 32, 2 if shift or padded else 1
    height, width = (side * n - padded for n in window)
    numbers = (heads, height, width, *window, shift, int(cosine))
    channels, tokens = heads * head_width, prefix + height * width
    rows = (2 * window[0] - 1) * (2 * window[1] - 1) + 3 * prefix
    qkv, out = (_meta(batch, tokens, n * channels, dtype=dtype) for n in (3, 1))
    bias = _meta(2, channels, dtype=dtype)
    tables = _meta(rows, heads) if table else None
    scale, lse = _meta(heads), _meta(heads, batch, tokens)
    kernels.forward(qkv, bias, tables, scale, numbers)
    kernels.backward(out, qkv, bias, tables, scale, out, lse, numbers)


def _meta(*shape: int, dtype: torch.dtype = FLOAT32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


# Batch, height and width of the map, window, shift, heads, head width: small, but with every class
# of tiles, and odd sizes.
COMPARED: dict[str, tuple[int, ...]] = {
    "4": (1, 4, 8, 4, 0, 1, 32),
    "6": (1, 12, 6, 6, 0, 1, 32),
    "7": (1, 7, 14, 7, 0, 2, 32),
    "8, narrow heads": (1, 8, 8, 8, 0, 1, 16),
    "9, padded": (1, 8, 9, 9, 0, 1, 32),
    "11, wide heads": (1, 11, 11, 11, 0, 1, 48),
    "12, shifted": (1, 12, 24, 12, 6, 1, 32),
    "13, shifted and padded": (1, 25, 13, 13, 6, 1, 24),
    "14": (1, 14, 14, 14, 0, 1, 32),
    "14, heads of 64": (1, 14, 14, 14, 7, 1, 64),
    "14, heads of 128": (1, 14, 14, 14, 7, 1, 128),
    "15, padded": (1, 15, 14, 15, 0, 1, 32),
    "17": (1, 17, 17, 17, 0, 1, 32),
    "24, padded": (1, 20, 24, 24, 0, 1, 32),
    "31": (1, 31, 31, 31, 0, 1, 16),
    "33, padded": (1, 33, 32, 33, 0, 1, 16),
}
# Whole images: window, prefix and head width as the kernels have them.
COMPARED_IMAGES: set[tuple[tuple[int, int], int, int]] = {
    ((14, 14), 1, 64),
    ((16, 16), 1, 64),
    ((1, 197), 0, 64),
    ((1, 257), 0, 64),
}


CASES: dict[str, Callable[[], None]] = {
    **{
        f"residual_norm, {width} channels, {str(stream)[6:]} stream": partial(norms, width, stream)
        for width in NORM_WIDTHS
        for stream in (FLOAT32, BFLOAT16)
    },
    "residual_norm, 2048 channels, two rows": partial(norms, 2048, BFLOAT16, rows=2),
    **{
        f"residual_norm, {width} channels, {str(stream)[6:]} stream, float32 branch": partial(
            norms, width, stream, other=FLOAT32
        )
        for width in FLOAT32_WIDTHS
        for stream in (FLOAT32, BFLOAT16)
    },
    # SwinV2-G's windows of stages 1 to 3 and of 4, at 192 and 224 pixels; larger images' windows.
    **{
        f"window_attention, window {w}, shift {shift}": partial(attention, (w, w), shift=shift)
        for w, shift in ((6, 0), (7, 0), (12, 0), (12, 6), (14, 0), (14, 7), (24, 12), (48, 24))
    },
    "window_attention, window 12, padded": partial(attention, (12, 12), shift=6, padded=True),
    "window_attention, window 14, dot product": partial(attention, (14, 14), cosine=False),
    "window_attention, window 8, head width 16": partial(attention, (8, 8), head_width=16),
    "window_attention, window 12, float32": partial(attention, (12, 12), dtype=FLOAT32),
    # With all that a window can have, in every class of tiles.
    **{
        f"window_attention, window {w}, head width {d}, shifted, padded": partial(
            attention, (w, w), head_width=d, shift=w // 2, padded=True
        )
        for w, d in (
            *((5, 32), (24, 32), (33, 32), (4, 64), (14, 64), (24, 64), (48, 64)),
            *((11, 48), (14, 88), (7, 128), (13, 128), (14, 128), (16, 128)),
        )
    },
    "window_attention, window 24, head width 32, shifted, padded, float32": partial(
        attention, (24, 24), shift=12, padded=True, dtype=FLOAT32
    ),
    # A ViT's windows, in detection.
    "window_attention, window 14, head width 64, padded, dot product, no table": partial(
        attention, (14, 14), head_width=64, padded=True, cosine=False, table=False
    ),
    # ViT-B and ViT-L.
    **{
        f"window_attention, {side**2 + 1} tokens, table": partial(
            attention, (side, side), head_width=64, prefix=1, cosine=False
        )
        for side in (14, 16)
    },
    "window_attention, 257 tokens, table, head width 88": partial(
        attention, (16, 16), head_width=88, prefix=1, cosine=False
    ),
    **{
        f"window_attention, {n} tokens": partial(
            attention, (1, n), head_width=64, cosine=False, table=False
        )
        for n in (197, 257)
    },
}
