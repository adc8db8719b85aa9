"""Computes attention between the qkv projection and the output projection, without moving tokens.

One operation serves SwinV2's windows (cosine), Swin's windows and whole ViT images (dot product).
The operation includes shift, windows, normalisation, scale, position bias, masks, softmax, weighted
sum, and the backward of all these. The plain version in `window_attention_reference.py` rolls the
map and copies windows; the Triton kernels, launched in `window_attention_launch.py`, read and write
tokens in place. `choose.py` selects the implementation.

Matrix products run in the dtype of qkv; normalisation of q and k, scale, bias and softmax in
float32 (float64 in a float64 run).

Source: Liu et al., arXiv 2103.14030 and 2111.09883; Dao et al., arXiv 2205.14135, for softmax in
tiles and its backward.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fd_large.errors import ConfigError
from fd_large.kernels import choose
from fd_large.kernels.check import checked
from fd_large.kernels.operation import check_shapes, twin
from fd_large.kernels.window_attention_launch import forward
from fd_large.kernels.window_attention_reference import Layout, Memory, reference


@checked
def window_attention(
    qkv: Tensor,
    *,
    num_heads: int,
    window: int,
    shift: int,
    scale: Tensor | float,
    cosine: bool,
    bias: Tensor | None = None,
    table: Tensor | None = None,
    memory: Memory = "keep",
) -> Tensor:
    """Computes attention within the (shifted) windows of a map.

    A map that its window does not divide is padded right and bottom with tokens that are masked.

    Args:
        qkv: (B, H, W, 3C), queries, keys and values, each with its heads side by side.
        num_heads: h.
        window: Side w of a window, in tokens.
        shift: Offset of the windows from the map's corner, in tokens.
        scale: Factor of the logits: a number, or (h,) float32.
        cosine: Whether logits are cosines of q and k instead of dot products.
        bias: (2, C), the biases of queries and of values. This function adds the biases in place of
            the qkv layer, so that the biases' gradients need no separate pass. None means 0.
        table: ((2w - 1)^2, h) float32, the position bias of each offset between query and key,
            added to the logits; None without a position bias.
        memory: What the plain version does with the (N, N) attention maps until backward: "keep"
            stores them, "recompute" computes them again, and "sequential" computes them again for
            a few windows at a time.

    Returns: (B, H, W, C), dtype of qkv.
    Raises:
        ConfigError: if `memory` is "keep" in training on a GPU and the Triton kernels do not run,
            because the attention maps would fill the GPU's memory.
    """
    height, width = qkv.shape[1:3]
    layout = Layout(num_heads, height, width, (window, window), shift, cosine)
    out = _attention(qkv.flatten(1, 2), bias, table, scale, layout, memory)
    return out.unflatten(1, (height, width))


@checked
def image_attention(
    qkv: Tensor,
    *,
    num_heads: int,
    grid: tuple[int, int],
    scale: float,
    bias: Tensor | None = None,
    table: Tensor | None = None,
    memory: Memory = "keep",
) -> Tensor:
    """Computes dot-product attention over all tokens of an image.

    Args:
        qkv: (B, N, 3C), with at most one class token before the patches if there is a table.
        num_heads: h.
        grid: (H, W) of the patches.
        scale: Factor of the logits.
        bias: (2, C), the biases of queries and of values. This function adds the biases in place of
            the qkv layer, so that the biases' gradients need no separate pass. None means 0.
        table: ((2H - 1)(2W - 1), h) float32, the position bias of each offset between query and
            key, added to the logits; None without a position bias. With a class token the table has
            three rows more: for the pairs (query, key) = (CLS, patch), (patch, CLS), (CLS, CLS).
        memory: What the plain version does with the (N, N) attention maps until backward: "keep"
            stores them; "recompute" and "sequential" compute them again.

    Returns: (B, N, C), dtype of qkv.
    Raises:
        ConfigError: if `memory` is "keep" in training on a GPU and the Triton kernels do not run,
            because the attention maps would fill the GPU's memory.
    """
    if table is None:
        grid = (1, qkv.shape[1])
    layout = Layout(num_heads, *grid, window=grid, shift=0, cosine=False)
    return _attention(qkv, bias, table, scale, layout, memory)


def _attention(
    qkv: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    scale: Tensor | float,
    layout: Layout,
    memory: Memory,
) -> Tensor:
    num_heads, height, width, window, shift, cosine = layout
    prefix = qkv.shape[1] - height * width
    choice = choose.implementation(
        "window_attention",
        qkv.device.type,
        window=window,
        prefix=prefix,
        head_width=qkv.shape[2] // (3 * num_heads),
        table=table is not None,
        shifted_product=bool(shift) and not cosine,
        empty=not qkv.numel(),
        qkv=qkv.dtype,
        bias=qkv.dtype if bias is None else bias.dtype,
    )
    if choice == "triton":
        if not isinstance(scale, Tensor):
            scale = qkv.new_full((num_heads,), scale, dtype=torch.float32)
        offsets = (2 * window[0] - 1) * (2 * window[1] - 1)
        check_shapes(
            "window_attention",
            f"qkv {tuple(qkv.shape)}",
            bias=(bias, (2, qkv.shape[2] // 3)),
            table=(table, (offsets + 3 * prefix, num_heads)),
            scale=(scale, (num_heads,)),
        )
        table = None if table is None else table.float()
        numbers = (num_heads, height, width, *window, shift, int(cosine))
        return forward(qkv, bias, table, scale.float(), numbers)[0]
    if memory == "keep" and qkv.is_cuda and torch.is_grad_enabled():
        raise ConfigError(
            "student.attention_memory: attention maps must not be kept on a GPU; got 'keep', "
            "expected 'recompute'. Set --student.attention_memory auto."
        )
    attend = twin("window_attention", choice, reference, qkv)
    return attend(qkv, bias, table, scale, layout, memory)


def untested(
    *,
    window: tuple[int, int],
    prefix: int,
    head_width: int,
    table: bool,
    shifted_product: bool,
    empty: bool,
    qkv: torch.dtype,
    bias: torch.dtype,
) -> str:
    """Returns why the kernels are not tested in a case, or "" if they are tested.

    Args:
        window: Rows and columns of a window, in tokens.
        prefix: Number of prefix tokens, such as a class token, before the map's tokens.
        head_width: Number of channels of a head.
        table: Whether there is a position bias.
        shifted_product: Whether logits are dot products in shifted windows.
        empty: Whether qkv has no elements.
        qkv: Data type of qkv.
        bias: Data type of the biases of queries and values.
    """
    if empty:
        return "no tokens"
    if not 16 <= head_width <= 128:
        return f"head width {head_width}"
    if table and (prefix > 1 or not 4 <= min(window) <= max(window) <= 48):
        return f"window {window[0]}x{window[1]}"
    if table and head_width > 64 and max(window) > 16:
        # The gradient of the table would spill registers.
        return f"window {window[0]}x{window[1]} with head width {head_width}"
    # So would these cases, at some windows.
    if head_width > 32 and shifted_product:
        return f"dot product in shifted windows with head width {head_width}"
    if head_width > 32 and qkv == torch.float32:
        return f"float32 with head width {head_width}"
    return ", ".join(
        f"{name} {dtype}"
        for name, dtype in (("qkv", qkv), ("bias", bias))
        if dtype not in (torch.float32, torch.bfloat16)
    )


choose.register("window_attention", untested)
