"""Attention maps of every layer while a model runs, recomputed from queries, keys and bias.

Fused kernels never hold a map. So it is computed a second time: for this project's models from the
inputs of their attention modules, for timm's from the operands that their modules pass to torch. A
layer's maps are passed on at once and not kept.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fd_large.backbones.swin import swin
from fd_large.backbones.swinv2 import swinv2
from fd_large.backbones.vit import vit
from fd_large.diagnose.token_positions import (
    PREFIX,
    TokenPositions,
    image_positions,
    window_positions,
)
from fd_large.kernels.window_attention_reference import position_index, region_ids, region_mask

Note = Callable[[str, Tensor, TokenPositions], None]
"""(name of the module, maps (B, nW, h, T, T) float32, positions of its tokens)."""


@contextmanager
def maps_to(note: Note, model: nn.Module, grid: tuple[int, int]) -> Iterator[None]:
    """Passes the maps of a model's attention layers to `note` as it runs, in order of execution.

    Layers whose tokens are not those of an image or of Swin's windows are left out.

    Args:
        note: Called in the middle of the forward.
        model: A backbone of this project or a `TimmBackbone`; other models have no known maps.
        grid: Rows and columns of the model's feature map.
    """
    with ExitStack() as stack:
        for name, module in model.named_modules():
            for kind, recompute in _OWN.items():
                if type(module) is kind:
                    handle = module.register_forward_pre_hook(_own_hook(note, name, recompute))
                    stack.callback(handle.remove)
        if _is_timm(model):
            seen = _Operands(note, _timm_positions(model, grid))
            stack.callback(model.register_forward_pre_hook(seen.count).remove)
            for name, module in model.named_modules():
                if "Attention" in type(module).__name__:
                    for handle in seen.watch(name, module):
                        stack.callback(handle.remove)
            stack.enter_context(seen)
        yield


# --- models of this project ---


def _own_hook(
    note: Note, name: str, recompute: Callable[..., tuple[Tensor, TokenPositions]]
) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        with torch.no_grad():
            note(name, *recompute(module, *inputs))

    return hook


def _of_vit(
    module: vit.Attention,
    x: Tensor,
    table: Tensor | None,
    grid: tuple[int, int],
    window: int = 0,
) -> tuple[Tensor, TokenPositions]:
    projected = module.qkv(x)
    if module.q_bias is not None:
        # A bias of the keys adds the same to all logits of a query: no map depends on it.
        projected = projected + F.pad(module.q_bias, (0, 2 * len(module.q_bias)))
    if module.relative_position_bias_table is not None:
        table = module.relative_position_bias_table
    if window:
        positions = window_positions(grid, (window, window), (0, 0), pad_first=True)
    else:
        positions = image_positions(grid, x.shape[1] - grid[0] * grid[1])
    scale = (x.shape[-1] // module.num_heads) ** -0.5
    return _maps(projected, module.num_heads, scale, False, table, positions, 0), positions


def _of_swin(module: swin.WindowAttention, x: Tensor, shift: int) -> tuple[Tensor, TokenPositions]:
    window = (module.window_size, module.window_size)
    positions = window_positions(tuple(x.shape[1:3]), window, (shift, shift), pad_first=True)
    projected = module.qkv(x).flatten(1, 2)
    scale = (x.shape[-1] // module.num_heads) ** -0.5
    table = module.relative_position_bias_table
    return _maps(projected, module.num_heads, scale, False, table, positions, shift), positions


def _of_swinv2(
    module: swinv2.CosineAttention, x: Tensor, window: int, shift: int, position_table: Tensor
) -> tuple[Tensor, TokenPositions]:
    positions = window_positions(
        tuple(x.shape[1:3]), (window, window), (shift, shift), pad_first=True
    )
    projected = module.qkv(x).flatten(1, 2)
    if module.q_bias is not None:
        projected = projected + F.pad(module.q_bias, (0, 2 * len(module.q_bias)))
    scale = module.logit_scale.float().clamp(max=math.log(100)).exp()  # (h, 1, 1)
    return _maps(
        projected, module.num_heads, scale, True, position_table, positions, shift
    ), positions


_OWN: dict[type, Callable[..., tuple[Tensor, TokenPositions]]] = {
    vit.Attention: _of_vit,
    swin.WindowAttention: _of_swin,
    swinv2.CosineAttention: _of_swinv2,
}


def _maps(
    projected: Tensor,
    num_heads: int,
    scale: Tensor | float,
    cosine: bool,
    table: Tensor | None,
    positions: TokenPositions,
    shift: int,
) -> Tensor:
    """Computes the maps of an attention module of this project.

    Args:
        projected: (B, N, 3C), the bias of the queries added; tokens in the order of the image,
            prefix tokens first.
        num_heads: Number of heads, h.
        scale: Factor of the logits: a number, or (h, 1, 1).
        cosine: Whether queries and keys are normalised.
        table: Position bias by offset, or None.
        positions: Positions of the windows' tokens.
        shift: Shift of the windows, in tokens.

    Returns: (B, nW, h, T, T) float32.
    """
    q, k, _ = rearrange(
        _in_windows(projected, positions).float(),
        "b w t (three h d) -> three b w h t d",
        three=3,
        h=num_heads,
    )
    if cosine:
        q, k = F.normalize(q, dim=-1, eps=1e-12), F.normalize(k, dim=-1, eps=1e-12)
    logits = (q * scale) @ k.transpose(-2, -1)
    if table is not None:
        has_prefix = bool((positions.index == PREFIX).any())
        index = position_index(*positions.window, has_prefix, table.device)
        logits = logits + table.float()[index].permute(2, 0, 1)
    if not bool(positions.whole.all()):
        regions = region_ids(*positions.grid, positions.window, shift, logits.device)
        logits = logits + region_mask(regions, torch.float32)[:, None]
    return logits.softmax(-1)


def _in_windows(projected: Tensor, positions: TokenPositions) -> Tensor:
    """Gathers the tokens (B, N, C) of each window: (B, nW, T, C), padding as 0."""
    index = positions.index.to(projected.device)
    if len(index) == 1 and index.shape[1] == projected.shape[1]:
        return projected[:, None]
    # The last row is the padding's, whose number is -1.
    return F.pad(projected, (0, 0, 0, 1))[:, index]


# --- models of timm ---

_SOFTMAX = (torch.softmax, torch.Tensor.softmax, F.softmax)


class _Operands(TorchFunctionMode):
    """Sees what timm's attention modules pass to torch's fused attention, or to a softmax."""

    def __init__(self, note: Note, positions: Callable[[str, int], TokenPositions | None]) -> None:
        super().__init__()
        self._note, self._positions = note, positions
        self._inside: list[str] = []
        self._num_images = 0

    def count(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Remembers the number of images; the hook of a whole model."""
        self._num_images = len(inputs[0])

    def watch(self, name: str, module: nn.Module) -> list[Any]:
        """Adds hooks that remember which module is running."""
        return [
            module.register_forward_pre_hook(lambda *_: self._inside.append(name)),
            module.register_forward_hook(lambda *_: self._left()),
        ]

    def _left(self) -> None:
        self._inside.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if self._inside:
            if func is F.scaled_dot_product_attention:
                self._pass_on(_map_of(*args, **(kwargs or {})))
            elif func in _SOFTMAX:
                self._pass_on(out)
        return out

    def _pass_on(self, attention: Tensor) -> None:
        """Passes on maps (B * nW, h, T, T) of tokens whose positions are known."""
        if attention.dim() != 4 or attention.shape[-1] != attention.shape[-2]:
            return
        positions = self._positions(self._inside[-1], attention.shape[-1])
        # Windows of another kind may have as many tokens as the model's map, but are more.
        if positions is None or len(attention) != self._num_images * len(positions.index):
            return
        by_image = attention.detach().float().unflatten(0, (-1, len(positions.index)))
        self._note(self._inside[-1], by_image, positions)


def _map_of(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **other: Any,
) -> Tensor:
    """Computes the map (B, h, T, T) inside scaled_dot_product_attention from its arguments."""
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = (query.float() * scale) @ key.float().transpose(-2, -1)
    if is_causal:
        attn_mask = logits.new_ones(logits.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask
    return logits.softmax(-1)


def _is_timm(model: nn.Module) -> bool:
    # timm takes a second to import, which other models are spared.
    return type(model).__module__ == "fd_large.backbones.timm.timm_backbone"


def _timm_positions(
    backbone: nn.Module, grid: tuple[int, int]
) -> Callable[[str, int], TokenPositions | None]:
    """Finds the positions of an attention module's tokens by its name and their number."""
    from timm.models.swin_transformer import SwinTransformerBlock
    from timm.models.swin_transformer_v2 import SwinTransformerV2Block

    modules = dict(backbone.named_modules())

    @lru_cache
    def positions(name: str, num_tokens: int) -> TokenPositions | None:
        block = modules[name.rpartition(".")[0]]
        if isinstance(block, SwinTransformerBlock | SwinTransformerV2Block):
            window, shift = (tuple(size) for size in (block.window_size, block.shift_size))
            return window_positions(tuple(block.input_resolution), window, shift, pad_first=False)
        num_prefix_tokens = getattr(backbone.net, "num_prefix_tokens", 0)
        if num_tokens == num_prefix_tokens + grid[0] * grid[1]:
            return image_positions(grid, num_prefix_tokens)
        return None

    return positions
