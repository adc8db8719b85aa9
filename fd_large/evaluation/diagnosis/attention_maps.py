"""Computes the attention maps of every layer while a model runs.

Fused kernels never store an attention map, so each map is computed a second time. For models of
this package, it is computed from the inputs of their attention modules; for models of timm, from
the queries, keys and biases that their modules pass to torch. A layer's maps are passed to a
function at once and not stored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from fd_large.backbones.token_positions import TokenPositions

Note = Callable[[str, Tensor, TokenPositions], None]
"""Function of the attention module's name, its maps (B, nW, h, T, T) and its tokens' positions.

The maps are float32, of B images, nW windows, h heads and T tokens.
"""


@contextmanager
def maps_to(note: Note, model: nn.Module, grid: tuple[int, int]) -> Iterator[None]:
    """Passes the maps of a model's attention layers to `note` whenever the model runs in the block.

    Layers come in order of execution. Only layers are included in which all tokens of an image, or
    all tokens of a Swin model's window, attend to one another.

    Args:
        note: Function that is called for each layer, in the middle of the forward.
        model: A backbone whose attention modules have a method `attention_maps`, or that has a
            method `token_positions`; `note` is not called for other models.
        grid: Rows and columns of the model's feature map.
    """
    with ExitStack() as stack:
        for name, module in model.named_modules():
            if hasattr(module, "attention_maps"):
                handle = module.register_forward_pre_hook(_own_hook(note, name))
                stack.callback(handle.remove)
        if hasattr(model, "token_positions"):
            operands = _Operands(note, model.token_positions(grid))
            stack.callback(model.register_forward_pre_hook(operands.count).remove)
            for name, module in model.named_modules():
                if "Attention" in type(module).__name__:
                    for handle in operands.watch(name, module):
                        stack.callback(handle.remove)
            stack.enter_context(operands)
        yield


# --- models of this project ---


def _own_hook(note: Note, name: str) -> Any:
    def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        with torch.no_grad():
            note(name, *module.attention_maps(*inputs))

    return hook


# --- models of timm ---

_SOFTMAX = (torch.softmax, torch.Tensor.softmax, F.softmax)


class _Operands(TorchFunctionMode):
    """Computes attention maps from calls of torch's attention or softmax in timm's modules."""

    def __init__(self, note: Note, positions: Callable[[str, int], TokenPositions | None]) -> None:
        super().__init__()
        self._note, self._positions = note, positions
        self._inside: list[str] = []
        self._num_images = 0

    def count(self, model: nn.Module, inputs: tuple[Any, ...]) -> None:
        """Pre-hook of the whole `model`, which records the number of images in `inputs[0]`.

        `_pass_on` needs this number in the same forward.
        """
        self._num_images = len(inputs[0])

    def watch(self, name: str, module: nn.Module) -> list[Any]:
        """Adds hooks to a module of timm, which tell which module calls torch's attention.

        Args:
            name: Name of the module.
            module: The module, whose name is on top of `self._inside` while the module runs.

        Returns: the handles that remove the hooks.
        """
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
        """Passes the maps of the running layer to `note`.

        Nothing is passed if `attention` has another shape, or if the positions of the T tokens in
        the image are unknown.

        Args:
            attention: The maps, (B * nW, h, T, T), of B images with nW windows and h heads.
        """
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
    """Returns the attention map (B, h, T, T) of a call of `scaled_dot_product_attention`.

    The arguments are those of `scaled_dot_product_attention`; `dropout_p` is ignored.
    """
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    logits = (query.float() * scale) @ key.float().transpose(-2, -1)
    if is_causal:
        attn_mask = logits.new_ones(logits.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        logits = logits.masked_fill(~attn_mask, -torch.inf)
    elif attn_mask is not None:
        logits = logits + attn_mask
    return logits.softmax(-1)
