"""Attention from the qkv projection to the input of the output projection, tokens left in place.

One operation serves SwinV2's windows (cosine), Swin's windows and whole ViT images (dot product):
shift, windows, normalisation, scale, position bias, masks, softmax and weighted sum, and the way
back. The plain twin (`reference`) rolls the map and copies windows; the Triton kernels in
`window_attention_triton.py` move nothing but their inputs and results. `choose.py` says which runs.

Products run in the dtype of qkv; normalisation of q and k, scale, bias and softmax in float32
(float64 in a float64 run).

Source: Liu et al., arXiv 2103.14030 and 2111.09883; Dao et al., arXiv 2205.14135, for softmax in
tiles and its backward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fd_large.errors import ConfigError, ShapeError
from fd_large.kernels import choose

# What the plain twin does with its (N, N) maps until backward; the kernels have none.
# "sequential" makes them again as "recompute" does, and never for more than a few windows at once.
Memory = Literal["keep", "recompute", "sequential"]

# The published penalty between regions of a shifted window: not -inf.
REGION_PENALTY = -100.0
# Region id of padding: no query sees such a key.
PADDING = -1
# Elements of the maps that "sequential" makes at once: 256 MiB of float32.
_SEQUENTIAL_ELEMENTS = 2**26


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
    """Attention within the (shifted) windows of a map.

    A map that its window does not divide is padded right and bottom with tokens that none sees.

    Args:
        qkv: (B, H, W, 3C), queries, keys and values, each with its heads side by side.
        num_heads: h.
        window: Side w of a window in tokens.
        shift: By how much windows start off the map's corner, in tokens.
        scale: Of the logits: a number, or (h,) float32.
        cosine: Logits from the cosine of q and k in place of their product.
        bias: (2, C), added to queries and to values: its gradient then needs no pass of its own.
        table: ((2w - 1)^2, h) float32, added to the logits by offset; None: no position bias.
        memory: "keep" stores the (N, N) maps for backward; "recompute" makes them again;
            "sequential" does so for a few windows at a time.

    Returns: (B, H, W, C), dtype of qkv.
    Raises: ConfigError: for "keep" on a GPU without kernels: the maps would fill its memory.
    """
    height, width = qkv.shape[1:3]
    out = _attention(
        qkv.flatten(1, 2),
        num_heads=num_heads,
        height=height,
        width=width,
        window=(window, window),
        shift=shift,
        scale=scale,
        cosine=cosine,
        bias=bias,
        table=table,
        memory=memory,
    )
    return out.unflatten(1, (height, width))


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
    """Dot-product attention over all tokens of an image; as `window_attention`.

    Args:
        qkv: (B, N, 3C), at most one class token before the patches where there is a table.
        num_heads: h.
        grid: (H, W) of the patches.
        scale: Of the logits.
        bias: (2, C), added to queries and to values.
        table: ((2H - 1)(2W - 1), h) float32, and with a class token three rows more: CLS to any,
            any to CLS, CLS to itself; None: no position bias.
        memory: As in `window_attention`.

    Returns: (B, N, C), dtype of qkv.
    """
    if table is None:
        grid = (1, qkv.shape[1])
    return _attention(
        qkv,
        num_heads=num_heads,
        height=grid[0],
        width=grid[1],
        window=grid,
        shift=0,
        scale=scale,
        cosine=False,
        bias=bias,
        table=table,
        memory=memory,
    )


def _attention(
    qkv: Tensor,
    *,
    num_heads: int,
    height: int,
    width: int,
    window: tuple[int, int],
    shift: int,
    scale: Tensor | float,
    cosine: bool,
    bias: Tensor | None,
    table: Tensor | None,
    memory: Memory,
) -> Tensor:
    choice = choose.implementation(
        "window_attention",
        qkv.device.type,
        window=window,
        prefix=qkv.shape[1] - height * width,
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
        _check(qkv, num_heads, window, height * width, bias=bias, table=table, scale=scale)
        numbers = (num_heads, height, width, *window, shift, cosine)
        return torch.ops.fd_large.window_attention(
            qkv.contiguous(),
            None if bias is None else bias.contiguous(),
            None if table is None else table.float(),
            scale.float().contiguous(),
            *numbers,
        )[0]
    if memory == "keep" and qkv.is_cuda and torch.is_grad_enabled():
        raise ConfigError(
            "student.attention_memory: attention maps must not be kept on a GPU; got 'keep', "
            "expected 'recompute'. Set --student.attention_memory auto."
        )
    return reference(
        qkv,
        bias,
        table,
        scale,
        num_heads=num_heads,
        height=height,
        width=width,
        window=window,
        shift=shift,
        cosine=cosine,
        memory=memory,
    )


def _check(
    qkv: Tensor, num_heads: int, window: tuple[int, int], places: int, **small: Tensor | None
) -> None:
    """Compares what the kernels, which see addresses alone, would read past the end of."""
    rows = (2 * window[0] - 1) * (2 * window[1] - 1) + 3 * (qkv.shape[1] - places)
    shapes = {"bias": (2, qkv.shape[2] // 3), "table": (rows, num_heads), "scale": (num_heads,)}
    for name, tensor in small.items():
        if tensor is not None and tensor.shape != shapes[name]:
            raise ShapeError(
                f"window_attention: {name} does not go with qkv {tuple(qkv.shape)}; got "
                f"{tuple(tensor.shape)}, expected {shapes[name]}. Pass one that does."
            )


# --- the plain twin ---


def reference(
    qkv: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    scale: Tensor | float,
    *,
    num_heads: int,
    height: int,
    width: int,
    window: tuple[int, int],
    shift: int,
    cosine: bool,
    memory: Memory = "keep",
) -> Tensor:
    """The operation in plain torch, by autograd alone.

    Args:
        qkv: (B, N, 3C), any prefix tokens and then the rows of the map; a prefix means that the
            window is the map.
        bias: (2, C) or None.
        table: (R, h) or None.
        scale: A number or (h,).
        num_heads: h.
        height: Rows of the map.
        width: Columns of the map.
        window: Rows and columns of a window.
        shift: In tokens, both ways.
        cosine: As in `window_attention`.
        memory: As in `window_attention`.

    Returns: (B, N, C).
    """
    if bias is not None:
        bias = torch.cat([bias[0], torch.zeros_like(bias[0]), bias[1]])
        qkv = (qkv + bias).to(qkv.dtype)
    index = regions = None
    if table is not None:
        index = position_index(*window, qkv.shape[1] > height * width, qkv.device)
    if isinstance(scale, Tensor):
        scale = scale.view(-1, 1, 1)
    split = {"three": 3, "h": num_heads}
    if window == (height, width) and not shift:
        q, k, v = rearrange(qkv, "b n (three h d) -> three b h n d", **split)
        out = _groups(q, k, v, scale, cosine, table, index, regions, 1, memory)
        return rearrange(out, "b h n d -> b n (h d)")
    x = qkv.unflatten(1, (height, width))
    bottom, right = -height % window[0], -width % window[1]
    if bottom or right:
        x = F.pad(x, (0, 0, 0, right, 0, bottom))
    if shift:
        x = x.roll((-shift, -shift), dims=(1, 2))
    if shift or bottom or right:
        regions = region_ids(height, width, window, shift, qkv.device)
    rows, columns = x.shape[1] // window[0], x.shape[2] // window[1]
    sides = {"i": window[0], "j": window[1]}
    q, k, v = rearrange(x, "b (y i) (x j) (three h d) -> three (b y x) h (i j) d", **sides, **split)
    out = _groups(q, k, v, scale, cosine, table, index, regions, rows * columns, memory)
    out = rearrange(out, "(b y x) h (i j) d -> b (y i) (x j) (h d)", y=rows, x=columns, **sides)
    if shift:
        out = out.roll((shift, shift), dims=(1, 2))
    return out[:, :height, :width].flatten(1, 2)


def _groups(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | float,
    cosine: bool,
    table: Tensor | None,
    index: Tensor | None,
    regions: Tensor | None,
    windows: int,
    memory: Memory,
) -> Tensor:
    """Attention within each of B * nW groups of N tokens, (B * nW, h, N, D); regions (nW, N)."""
    if memory == "keep":
        return _group_attention(q, k, v, scale, cosine, table, index, regions)
    size = windows
    if memory == "sequential":
        elements = len(q) // windows * q.shape[1] * q.shape[2] ** 2
        size = max(1, min(windows, _SEQUENTIAL_ELEMENTS // elements))
    pieces = []
    for start in range(0, windows, size):
        some = slice(start, start + size)
        q_, k_, v_ = (t.unflatten(0, (-1, windows))[:, some].flatten(0, 1) for t in (q, k, v))
        there = None if regions is None else regions[some]
        arguments = (q_, k_, v_, scale, cosine, table, index, there)
        if torch.is_grad_enabled():
            # No random numbers inside, so there is no random state to keep.
            piece = checkpoint(
                _group_attention, *arguments, use_reentrant=False, preserve_rng_state=False
            )
        else:
            piece = _group_attention(*arguments)
        pieces.append(piece.unflatten(0, (len(q) // windows, -1)))
    return torch.cat(pieces, dim=1).flatten(0, 1) if len(pieces) > 1 else pieces[0].flatten(0, 1)


def _group_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: Tensor | float,
    cosine: bool,
    table: Tensor | None,
    index: Tensor | None,
    regions: Tensor | None,
) -> Tensor:
    wide = torch.promote_types(v.dtype, torch.float32)
    q, k = q.to(wide), k.to(wide)
    if cosine:
        q, k = F.normalize(q, dim=-1, eps=1e-12), F.normalize(k, dim=-1, eps=1e-12)
    # The scale goes to q, N x D numbers, instead of to the logits, N x N: autograd then keeps one
    # map less.
    logits = ((q * scale).to(v.dtype) @ k.to(v.dtype).transpose(-2, -1)).to(wide)
    if table is not None:
        # An embedding look-up, because its backward is deterministic on GPUs too.
        bias = F.embedding(index, table).permute(2, 0, 1).contiguous()  # (h, N, N)
        logits += bias.to(wide)
    if regions is not None:
        mask = region_mask(regions, wide)  # (nW, N, N)
        by_image = logits.view(-1, mask.shape[0], *logits.shape[1:])  # (B, nW, h, N, N)
        logits = (by_image + mask[:, None]).view_as(logits)
    return logits.softmax(dim=-1).to(v.dtype) @ v


def region_mask(regions: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns what is added to the logits of queries (rows) and keys (columns): (nW, N, N)."""
    queries, keys = regions[:, :, None], regions[:, None, :]
    mask = (queries != keys).to(dtype) * REGION_PENALTY
    return mask.masked_fill_(keys == PADDING, -torch.inf)


@torch.compiler.assume_constant_result
def region_ids(
    height: int, width: int, window: tuple[int, int], shift: int, device: torch.device
) -> Tensor:
    """Returns ids of what belongs together in each (shifted) window: (nW, N) int64.

    After the roll, windows at the end hold pieces from opposite edges of the map: tokens with
    different ids were not neighbours. Padding has the id -1.

    Args:
        height: Rows of the map before padding.
        width: Columns of the map before padding.
        window: Rows and columns of a window.
        shift: In tokens; 0: ids tell padding only.
        device: Of the result.
    """
    return _region_ids(height, width, window, shift, device)


@lru_cache(maxsize=256)
def _region_ids(
    height: int, width: int, window: tuple[int, int], shift: int, device: torch.device
) -> Tensor:
    rows, row_is_padding = _axis_regions(height, window[0], shift)
    columns, column_is_padding = _axis_regions(width, window[1], shift)
    ids = rows[:, None] * 3 + columns[None, :]
    ids[row_is_padding[:, None] | column_is_padding[None, :]] = PADDING
    ids = rearrange(ids, "(h i) (w j) -> (h w) (i j)", i=window[0], j=window[1])
    return _tensor(ids, device)


def _axis_regions(length: int, window: int, shift: int) -> tuple[np.ndarray, np.ndarray]:
    padded = math.ceil(length / window) * window
    position = np.arange(padded)  # In the rolled map.
    region = np.zeros(padded, dtype=np.int64)
    if shift:
        region += position >= padded - window
        region += position >= padded - shift
    return region, (position + shift) % padded >= length


@torch.compiler.assume_constant_result
def position_index(rows: int, columns: int, class_token: bool, device: torch.device) -> Tensor:
    """Returns the table's row of every (query, key) pair of a grid: (N, N) int64.

    Row (dy + rows - 1)(2 columns - 1) + dx + columns - 1, with (dy, dx) = query - key. A class
    token comes first and has the last three rows: CLS to any, any to CLS, CLS to itself.
    """
    return _position_index(rows, columns, class_token, device)


@lru_cache(maxsize=64)
def _position_index(rows: int, columns: int, class_token: bool, device: torch.device) -> Tensor:
    y, x = (axis.reshape(-1) for axis in np.mgrid[:rows, :columns])
    dy, dx = y[:, None] - y[None, :], x[:, None] - x[None, :]
    index = (dy + rows - 1) * (2 * columns - 1) + dx + columns - 1
    if class_token:
        n = (2 * rows - 1) * (2 * columns - 1)
        patches, index = index, np.empty((rows * columns + 1,) * 2, dtype=np.int64)
        index[1:, 1:] = patches
        index[0, :], index[:, 0], index[0, 0] = n, n + 1, n + 2
    return _tensor(index, device)


def _tensor(array: np.ndarray, device: torch.device) -> Tensor:
    # Not an inference tensor, which autograd refuses to save, even where a teacher's forward under
    # inference_mode is the first to ask.
    with torch.inference_mode(False):
        return torch.from_numpy(np.ascontiguousarray(array, dtype=np.int64)).to(device)


# --- the operation of the kernels ---


class Partials(NamedTuple):
    """Shapes of the float32 partial sums of backward."""

    table: tuple[int, ...]
    bias: tuple[int, ...]
    scale: tuple[int, ...]


@dataclass(frozen=True)
class Geometry:
    """Where the tokens are, and in which tiles the kernels take them.

    Attributes:
        num_heads: h.
        head_width: C / h.
        height: Rows of the map.
        width: Columns of the map.
        window: Rows and columns of a window.
        shift: In tokens, both ways.
        cosine: Whether q and k are normalised.
        prefix: Tokens before the map's; with any, the window is the map.
    """

    num_heads: int
    head_width: int
    height: int
    width: int
    window: tuple[int, int]
    shift: int
    cosine: bool
    prefix: int

    @property
    def windows(self) -> int:
        """Windows of an image."""
        return _ceil(self.height, self.window[0]) * _ceil(self.width, self.window[1])

    @property
    def tokens(self) -> int:
        """N, tokens of a window."""
        return self.prefix + self.window[0] * self.window[1]

    @property
    def padded_width(self) -> int:
        """Head width as tiles have it."""
        return max(16, _power_of_2(self.head_width))

    @property
    def tile(self) -> int:
        """Tokens that a program owns; fewer where wide heads would spill their registers."""
        few = self.padded_width > 64 or (self.padded_width == 64 and self.cosine)
        return min(32 if few else 64, max(16, _power_of_2(self.tokens)))

    @property
    def tiles(self) -> int:
        """Programs to a window and head."""
        return _ceil(self.tokens, self.tile)

    @property
    def step(self) -> int:
        """Keys that forward looks at together; backward takes 16, as registers allow."""
        return 32 if self.tokens > 16 and self.padded_width <= 64 else 16

    @property
    def rest(self) -> int:
        """Keys after forward's whole steps, for a step of 16; 0: the last step is padded."""
        rest = self.tokens % self.step
        return rest if rest <= 16 < self.step else 0

    @property
    def row(self) -> int:
        """Slots of a window's row in a tile of the table's gradient."""
        return _power_of_2(self.window[1])

    @property
    def slots(self) -> int:
        """Side of such a tile; as `tile`."""
        return max(32 if self.padded_width <= 64 else 16, self.row)

    @property
    def kinds(self) -> int:
        """Diagonals of such tiles; a prefix has three more."""
        return 2 * _ceil(self.window[0], self.slots // self.row) - 1 + 3 * self.prefix

    def chunks(self, batch: int) -> int:
        """Over how many programs a head's windows are spread, for a tile of queries or keys.

        A function of shapes alone, as `groups` is, so that sums have the same order on every
        device. Fewer partial sums are less traffic; programs enough for a large GPU are left.
        """
        windows = batch * self.windows
        return _ceil(windows, max(1, min(4, windows * self.num_heads * self.tiles // 2048)))

    def groups(self, batch: int) -> int:
        """Over how many programs the windows are spread, for a diagonal of the table's gradient."""
        return min(batch * self.windows, _ceil(512, self.num_heads * self.kinds))

    def partials(self, batch: int) -> Partials:
        """Shapes of what backward sums in two stages."""
        block = (2 * (self.slots // self.row) - 1, self.window[1], self.window[1])
        programs = self.chunks(batch) * self.tiles
        return Partials(
            (self.groups(batch), self.num_heads, self.kinds, *block),
            (programs, 2, self.num_heads * self.head_width),
            (self.num_heads, programs),
        )


def _ceil(numerator: int, denominator: int) -> int:
    return -(-numerator // denominator)


def _power_of_2(number: int) -> int:
    return 1 << (number - 1).bit_length()


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
    """Says why the kernels were not tested in a case; empty if they were."""
    if empty:
        return "no tokens"
    if not 16 <= head_width <= 128:
        return f"head width {head_width}"
    if table and (prefix > 1 or not 4 <= min(window) <= max(window) <= 48):
        return f"window {window[0]}x{window[1]}"
    if table and head_width > 64 and max(window) > 16:
        # The gradient of the table would spill its registers.
        return f"window {window[0]}x{window[1]} with head width {head_width}"
    # So would these, at some windows.
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


@torch.library.custom_op("fd_large::window_attention", mutates_args=())
def _window_attention(
    qkv: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    scale: Tensor,
    num_heads: int,
    height: int,
    width: int,
    window_height: int,
    window_width: int,
    shift: int,
    cosine: bool,
) -> tuple[Tensor, Tensor]:
    """Returns the attention (B, N, C) and log2 of the softmax's sums (h, B, N) float32."""
    from fd_large.kernels import window_attention_triton

    window = (window_height, window_width)
    geometry = _geometry(qkv, num_heads, height, width, window, shift, cosine)
    return window_attention_triton.forward(qkv, bias, table, scale, geometry)


@_window_attention.register_fake
def _(qkv, bias, table, scale, num_heads, *geometry):
    batch, tokens, channels = qkv.shape
    lse = qkv.new_empty(num_heads, batch, tokens, dtype=torch.float32)
    return qkv.new_empty(batch, tokens, channels // 3), lse


@torch.library.custom_op("fd_large::window_attention_backward", mutates_args=())
def _window_attention_backward(
    dout: Tensor,
    qkv: Tensor,
    bias: Tensor | None,
    table: Tensor | None,
    scale: Tensor,
    out: Tensor,
    lse: Tensor,
    num_heads: int,
    height: int,
    width: int,
    window_height: int,
    window_width: int,
    shift: int,
    cosine: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Returns the gradients of qkv, bias, table and scale; the last three float32.

    A gradient that does not exist has no elements; the scale of a dot product is a constant.
    """
    from fd_large.kernels import window_attention_triton

    window = (window_height, window_width)
    geometry = _geometry(qkv, num_heads, height, width, window, shift, cosine)
    return window_attention_triton.backward(dout, qkv, bias, table, scale, out, lse, geometry)


def _geometry(
    qkv: Tensor,
    num_heads: int,
    height: int,
    width: int,
    window: tuple[int, int],
    shift: int,
    cosine: bool,
) -> Geometry:
    head_width, prefix = qkv.shape[2] // (3 * num_heads), qkv.shape[1] - height * width
    return Geometry(num_heads, head_width, height, width, window, shift, cosine, prefix)


@_window_attention_backward.register_fake
def _(dout, qkv, bias, table, scale, out, lse, num_heads, *geometry):
    def gradient(of: Tensor | None) -> Tensor:
        return scale.new_empty((0,) if of is None else of.shape)

    scales = gradient(scale if geometry[-1] else None)
    return torch.empty_like(qkv), gradient(bias), gradient(table), scales


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    tensors, ctx.geometry = inputs[:4], inputs[4:]
    ctx.save_for_backward(*tensors, *output)
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, dout: Tensor | None, dlse: None) -> tuple[Tensor | None, ...]:
    if dout is None:
        return (None,) * 11
    _, bias, table, scale, _, _ = saved = ctx.saved_tensors
    dqkv, dbias, dtable, dscale = torch.ops.fd_large.window_attention_backward(
        dout.contiguous(), *saved, *ctx.geometry
    )
    return (
        dqkv,
        None if bias is None else dbias.to(bias.dtype),
        None if table is None else dtable.to(table.dtype),
        dscale.to(scale.dtype) if ctx.geometry[-1] else None,
        *(None,) * 7,
    )


_window_attention.register_autograd(_differentiate, setup_context=_setup)


# --- how much memory it moves ---


def bytes_moved(
    geometry: Geometry,
    batch: int,
    dtype: torch.dtype = torch.bfloat16,
    *,
    bias: bool = True,
    table: bool = True,
) -> tuple[int, int]:
    """Bytes that the kernels read and write in device memory: (forward, backward).

    A tensor counts once per launch that reads or writes it, partial sums included: within a launch
    programs that share a tile run side by side and find it in the cache.

    Args:
        geometry: Of the attention.
        batch: B.
        dtype: Of qkv and bias.
        bias: Whether there is a bias.
        table: Whether there is a bias table.
    """
    g = geometry
    tokens = batch * (g.height * g.width + g.prefix)
    channels = g.num_heads * g.head_width
    stream = tokens * channels * dtype.itemsize
    small = tokens * g.num_heads * 4 + 2 * channels * dtype.itemsize * bias + 4 * g.num_heads
    rows = (2 * g.window[0] - 1) * (2 * g.window[1] - 1) + 3 * g.prefix
    # torch turns the table before each launch: read, written, read.
    tables = 3 * rows * g.num_heads * 4 * table
    shapes = g.partials(batch)
    partials = 4 * (
        math.prod(shapes.table) * table
        + math.prod(shapes.bias) * bias
        + math.prod(shapes.scale) * g.cosine
    )
    sums = 4 * (rows * g.num_heads * table + 2 * channels * bias + g.num_heads * g.cosine)
    return 4 * stream + small + tables, 8 * stream + small + tables + 2 * partials + sums
