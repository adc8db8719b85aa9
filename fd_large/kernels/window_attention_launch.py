"""Launches the kernels of `window_attention.py`, chooses their tiles, and counts their FLOPs."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from fd_large.kernels.operation import blocks, launch, operation

# Triton's interpreter multiplies bfloat16 incorrectly, and truncates where a GPU rounds.
_INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"


class Partials(NamedTuple):
    """Shapes of the partial sums that backward's programs write, all float32.

    Attributes:
        table: Shape of the partial gradients of the table of position biases: (groups of windows,
            heads, diagonals of tiles, distances of rows in a tile, columns of a window, columns of
            a window).
        bias: Shape of the partial gradients of the biases of queries and values: (programs, 2, C).
        scale: Shape of the partial gradients of the logits' scale: (heads, programs).
    """

    table: tuple[int, ...]
    bias: tuple[int, ...]
    scale: tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """Sizes of an attention's map, windows and heads, and the sizes of the kernels' tiles.

    Attributes:
        num_heads: h.
        head_width: C / h.
        height: Rows of the map.
        width: Columns of the map.
        window: Rows and columns of a window.
        shift: Offset of the windows in both directions, in tokens.
        cosine: Whether q and k are normalised.
        prefix: Number of prefix tokens, which come before the map's tokens. If it is not 0, the
            window is the whole map.
    """

    num_heads: int
    head_width: int
    height: int
    width: int
    window: tuple[int, int]
    shift: int
    cosine: bool
    prefix: int

    @classmethod
    def of(cls, qkv: Tensor, numbers: Sequence[int]) -> Geometry:
        """Returns the geometry of an attention.

        Args:
            qkv: (B, N, 3C), queries, keys and values of the prefix tokens, if any, and of the map.
            numbers: The number of heads, the rows and columns of the map, the rows and columns of a
                window, the shift, and whether q and k are normalised (1 or 0).
        """
        heads, height, width, rows, columns, shift, cosine = numbers
        head_width, prefix = qkv.shape[2] // (3 * heads), qkv.shape[1] - height * width
        return cls(heads, head_width, height, width, (rows, columns), shift, bool(cosine), prefix)

    @property
    def windows(self) -> int:
        """Number of windows in an image."""
        return blocks(self.height, self.window[0]) * blocks(self.width, self.window[1])

    @property
    def tokens(self) -> int:
        """N, the number of tokens of a window, with the `prefix` tokens before the map's tokens."""
        return self.prefix + self.window[0] * self.window[1]

    @property
    def padded_width(self) -> int:
        """Head width, rounded up to a power of 2 that is at least 16, as tiles need."""
        return max(16, _power_of_2(self.head_width))

    @property
    def tile(self) -> int:
        """Number of tokens in a tile, which a program works on: at most 64.

        For wide heads it is at most 32, since more tokens would spill registers.
        """
        few = self.padded_width > 64 or (self.padded_width == 64 and self.cosine)
        return min(32 if few else 64, max(16, _power_of_2(self.tokens)))

    @property
    def tiles(self) -> int:
        """Number of tiles into which the tokens of a window are divided.

        In the forward, this is the number of programs for each window and head.
        """
        return blocks(self.tokens, self.tile)

    @property
    def step(self) -> int:
        """Number of keys that the forward's loop over a window's keys takes at a time.

        The backward takes 16 keys at a time.
        """
        return 32 if self.tokens > 16 and self.padded_width <= 64 else 16

    @property
    def rest(self) -> int:
        """Number of keys of a window that the forward takes in a last, shorter step of 16 keys.

        These keys are left after all whole steps of `step` keys. The number is 0 if no key is left,
        if more than 16 keys are left (a whole step with padding takes them), or if `step` is 16.
        """
        rest = self.tokens % self.step
        return rest if rest <= 16 < self.step else 0

    @property
    def row(self) -> int:
        """Length to which the kernel for the table's gradient pads each row of a window.

        The length is a number of tokens: the columns of a window, rounded up to a power of 2.
        """
        return _power_of_2(self.window[1])

    @property
    def slots(self) -> int:
        """Number of queries, and of keys, in a tile of the kernel for the table's gradient.

        The number includes the padding of each row of a window to `row` tokens.
        """
        return max(32 if self.padded_width <= 64 else 16, self.row)

    @property
    def kinds(self) -> int:
        """Number of diagonals of tiles in the (query, key) matrix of a window's patches.

        All tiles on a diagonal add to the same rows of the table's gradient. A prefix token counts
        as three more diagonals: its pairs with patches as keys, with patches as queries, and with
        itself.
        """
        return 2 * blocks(self.window[0], self.slots // self.row) - 1 + 3 * self.prefix

    def chunks(self, batch: int) -> int:
        """Returns among how many programs the backward divides the windows of a batch.

        There are so many programs for each head and each tile of a window's tokens, both for the
        gradient of q and for the gradients of k and v. The number depends on shapes only, so that
        sums have the same order on every device. Fewer programs make fewer partial sums and so less
        memory traffic; enough programs remain for a large GPU.

        Args:
            batch: Number of images.
        """
        windows = batch * self.windows
        return blocks(windows, max(1, min(4, windows * self.num_heads * self.tiles // 2048)))

    def groups(self, batch: int) -> int:
        """Returns among how many programs the kernel for the table's gradient divides the windows.

        There are so many programs for each head and each of the `kinds` diagonals. The number
        depends on shapes only, so that sums have the same order on every device.

        Args:
            batch: Number of images.
        """
        return min(batch * self.windows, blocks(512, self.num_heads * self.kinds))

    def partials(self, batch: int) -> Partials:
        """Returns the shapes of backward's partial sums for a batch of `batch` images."""
        block = (2 * (self.slots // self.row) - 1, self.window[1], self.window[1])
        programs = self.chunks(batch) * self.tiles
        return Partials(
            (self.groups(batch), self.num_heads, self.kinds, *block),
            (programs, 2, self.num_heads * self.head_width),
            (self.num_heads, programs),
        )


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


@operation("window_attention")
def forward(
    qkv: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    scale: Tensor,
    numbers: Sequence[int],
) -> tuple[Tensor, Tensor]:
    """Computes attention within windows by the Triton kernel.

    Args:
        qkv: (B, N, 3C): prefix tokens, if any, and then the rows of the map.
        bias: (2, C), the biases of queries and values, or None.
        table: (R, h), the position bias of each offset, or None.
        scale: (h,) float32, the factor of the logits.
        numbers: The number of heads, the rows and columns of the map, the rows and columns of a
            window, the shift, and whether q and k are normalised (1 or 0).

    Returns: the output (B, N, C), and log2 of the denominator of each query's softmax, (h, B, N)
        float32.
    """
    geometry = Geometry.of(qkv, numbers)
    out = qkv.new_empty(*qkv.shape[:2], qkv.shape[2] // 3)
    lse = qkv.new_empty(geometry.num_heads, *qkv.shape[:2], dtype=torch.float32)
    programs = qkv.shape[0] * geometry.windows * geometry.num_heads * geometry.tiles
    launch(
        "window_attention_triton._forward", (programs,),
        qkv, bias, _in_bits(table), scale, out, lse, qkv.shape[0] * qkv.shape[1],
        geometry.height, geometry.width, geometry.num_heads,
        STEP=geometry.step, REST=geometry.rest, **_constants(geometry, qkv.dtype),
    )  # fmt: skip
    return out, lse


@operation("window_attention_backward")
def backward(
    dout: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    scale: Tensor,
    out: Tensor,
    lse: Tensor,
    numbers: Sequence[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of qkv, bias, table and scale, the last three in float32.

    The second or third result is empty if bias or table is None. The fourth result is empty for dot
    products, whose scale is a constant.

    Args:
        dout: (B, N, C), the gradient of the output.
        qkv: (B, N, 3C): prefix tokens, if any, and then the rows of the map.
        bias: (2, C), the biases of queries and values, or None.
        table: (R, h), the position bias of each offset, or None.
        scale: (h,) float32, the factor of the logits.
        out: (B, N, C), the output that `forward` returned.
        lse: (h, B, N), the logarithms that `forward` returned.
        numbers: The number of heads, the rows and columns of the map, the rows and columns of a
            window, the shift, and whether q and k are normalised (1 or 0).
    """
    geometry = Geometry.of(qkv, numbers)
    heads, batch = geometry.num_heads, qkv.shape[0]
    chunks, groups = geometry.chunks(batch), geometry.groups(batch)
    shapes = geometry.partials(batch)
    dqkv = torch.empty_like(qkv)
    parts = None if table is None else lse.new_empty(shapes.table)
    dbias = None if bias is None else lse.new_empty(shapes.bias)
    dscale = lse.new_empty(shapes.scale) if geometry.cosine else None
    tables = 0 if table is None else groups * geometry.kinds
    slots = {"SLOTS": geometry.slots, "ROW": geometry.row}
    launch(
        "window_attention_backward_triton._backward",
        (heads * (tables + 2 * chunks * geometry.tiles),),
        qkv, bias, _in_bits(table), scale, out, dout, lse, dqkv, dbias, dscale, parts,
        batch * qkv.shape[1], geometry.height, geometry.width, heads, batch * geometry.windows,
        chunks, groups,
        STEP=16, **slots, **_constants(geometry, qkv.dtype),
    )  # fmt: skip
    dtable = None if table is None else lse.new_empty(table.shape)
    if table is not None:
        offsets = len(table) - 3 * geometry.prefix
        launch(
            "window_attention_backward_triton.gather_table", (blocks(offsets, 64), heads),
            parts, dtable, heads, groups,
            PREFIX=geometry.prefix, WH=geometry.window[0], WW=geometry.window[1], BLOCK=64,
            **slots, num_warps=2,
        )  # fmt: skip
        if geometry.prefix:
            dtable[offsets:] = parts[:, :, -3:].flatten(3).sum((0, 3)).t()
    return (
        dqkv,
        None if dbias is None else dbias.sum(0),
        dtable,
        None if dscale is None else dscale.sum(1),
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.numbers = inputs
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 5
    _, bias, table, scale, _, _ = saved = ctx.saved_tensors
    dqkv, dbias, dtable, dscale = backward(dout, *saved, ctx.numbers)
    return (
        dqkv,
        None if bias is None else dbias.to(bias.dtype),
        None if table is None else dtable.to(table.dtype),
        dscale.to(scale.dtype) if ctx.numbers[-1] else None,
        None,
    )


forward.register_autograd(_differentiate, setup_context=_setup)


def _in_bits(table: Tensor | None) -> Tensor | None:
    """Returns the table as (h, R) times log2(e), because the kernels compute powers of 2.

    Args:
        table: (R, h), the position bias of each of R offsets for h heads; None for no table.

    Returns: (h, R), or None if `table` is None.
    """
    if table is None:
        return None
    turned = table.new_empty(table.shape[::-1])
    return torch.mul(table.t(), math.log2(math.e), out=turned)


def _constants(geometry: Geometry, dtype: torch.dtype) -> dict[str, Any]:
    window = geometry.window
    # Enough warps to keep tiles in registers; a window without a table may be any row of tokens.
    wide, long = geometry.padded_width > 64, dtype == torch.float32
    warps = 16 if wide and long else 8 if wide or long or geometry.slots == 64 else 4
    return {
        "PREFIX": geometry.prefix,
        "WH": window[0],
        "WW": window[1],
        "SHIFT": geometry.shift,
        "PADDED": geometry.height % window[0] != 0 or geometry.width % window[1] != 0,
        "D": geometry.head_width,
        "BD": geometry.padded_width,
        "COSINE": geometry.cosine,
        "INTERPRETED": _INTERPRETED,
        "TILE": geometry.tile,
        "num_warps": warps,
        "num_stages": 1,
    }


def _product_flops(qkv: Any, window: tuple[int, int], height: int, width: int) -> int:
    """Returns the FLOPs of one matrix product of attention, such as queries times keys.

    Args:
        qkv: Shape (B, N, 3C) of queries, keys and values.
        window: Rows and columns of a window. If these are the map's, all N tokens attend to one
            another, prefix tokens included.
        height: Rows of the map.
        width: Columns of the map.
    """
    batch, tokens, channels = qkv
    if window == (height, width):
        pairs = tokens * tokens
    else:
        rows, columns = -(-height // window[0]), -(-width // window[1])
        pairs = rows * columns * (window[0] * window[1]) ** 2
    return 2 * batch * pairs * (channels // 3)


@register_flop_formula(torch.ops.fd_large.window_attention)
def _forward_flops(
    qkv: Any, bias: Any, table: Any, scale: Any, numbers: Sequence[int], *_: Any, **__: Any
) -> int:
    _, height, width, *window = numbers[:5]
    return 2 * _product_flops(qkv, tuple(window), height, width)


@register_flop_formula(torch.ops.fd_large.window_attention_backward)
def _backward_flops(dout: Any, *arguments: Any, **named: Any) -> int:
    # Four products, and the logits computed again.
    return 5 * _forward_flops(*arguments[:4], arguments[6]) // 2
