"""Heads that map the student's tokens to the teacher's width.

Some heads map each token alone; heads with attention map all tokens of an image together.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from fd_large.errors import ConfigError
from fd_large.tasks.distillation.heads.map_head import WHERE


def linear(width: int, teacher_width: int) -> nn.Module:
    """Returns a linear layer from `width` to `teacher_width` channels, with torch's initialisation.

    This is the head of Feature Distillation (Wei et al., arXiv 2205.14141), initialised as
    published.
    """
    return nn.Linear(width, teacher_width)


class MLP(nn.Module):
    """A linear layer, then residual layers, and a layer norm, GELU and linear layer at the end.

    Source: the second version of RADIO's heads (Ranzinger et al., arXiv 2312.06709, in its code).

    Args:
        width: Channels of the student's tokens.
        teacher_width: Channels of the teacher's tokens.
        hidden: Hidden channels; None for twice the student's channels, a choice of this package.
        inner: Number of residual layers.
        pre_norm: Whether a layer norm and GELU come before the first linear layer.
    """

    def __init__(
        self,
        width: int,
        teacher_width: int,
        *,
        hidden: int | None = None,
        inner: int = 0,
        pre_norm: bool = False,
    ) -> None:
        super().__init__()
        hidden = hidden or 2 * width
        first = nn.Linear(width, hidden)
        self.first = (
            nn.Sequential(nn.LayerNorm(width), nn.GELU(), first)
            if pre_norm
            else nn.Sequential(first)
        )
        self.inner = nn.ModuleList(_normed(hidden, hidden) for _ in range(inner))
        self.last = _normed(hidden, teacher_width)

    def forward(self, tokens: Tensor) -> Tensor:
        """Returns the output, (B, N, teacher_width), for the student's `tokens`, (B, N, width)."""
        tokens = self.first(tokens)
        for layer in self.inner:
            tokens = tokens + layer(tokens)
        return self.last(tokens)


def mlp_relu(
    width: int,
    teacher_width: int,
    *,
    hidden: int | None = None,
    inner: int = 0,
    activation: Callable[[], nn.Module] = nn.ReLU,
) -> nn.Module:
    """Returns linear layers, each but the last followed by a layer norm and an activation.

    Source: the first version of RADIO's heads (arXiv 2312.06709, in its code). With GELU instead of
    ReLU, these are the layers of the head in version 2 of lightly-train's distillation.

    Args:
        width: Channels of the student's tokens.
        teacher_width: Channels of the teacher's tokens.
        hidden: Hidden channels; None for twice the student's channels.
        inner: Number of linear layers between the first and the last.
        activation: Constructor of the activation after each layer norm, ReLU by default.
    """
    hidden = hidden or 2 * width
    layers: list[nn.Module] = []
    for channels in (width, *[hidden] * inner):
        layers += [nn.Linear(channels, hidden), nn.LayerNorm(hidden), activation()]
    return nn.Sequential(*layers, nn.Linear(hidden, teacher_width))


def attention_mlp(
    width: int, teacher_width: int, *, hidden: int | None = None, pre_norm: bool = False
) -> nn.Module:
    """Returns two transformer blocks with 16 attention heads, and an `MLP`.

    Source: the third kind of RADIO's heads (arXiv 2312.06709, in its code).

    Args:
        width: Channels of the student's tokens.
        teacher_width: Channels of the teacher's tokens.
        hidden: See `MLP`.
        pre_norm: See `MLP`.

    Raises: ConfigError: if the width is not a multiple of 16.
    """
    blocks = [_block(width, heads=16, layer_scale=1e-5) for _ in range(2)]
    return nn.Sequential(*blocks, MLP(width, teacher_width, hidden=hidden, pre_norm=pre_norm))


def block(
    width: int, teacher_width: int, *, heads: int | None = None, blocks: int = 1
) -> nn.Module:
    """Returns transformer blocks and a linear layer, which run on CLS token and patches together.

    Source: Sariyildiz et al. (DUNE), arXiv 2503.14405.

    Args:
        width: Channels of the student's tokens.
        teacher_width: Channels of the teacher's tokens.
        heads: Number of attention heads; None for one for every 64 channels.
        blocks: Number of blocks.

    Raises: ConfigError: if the width is not a multiple of the number of attention heads.
    """
    make = partial(
        _block,
        width,
        heads=heads or max(1, width // 64),
        layer_scale=1e-4,
        qkv_bias=True,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
    )
    return nn.Sequential(*(make() for _ in range(blocks)), nn.Linear(width, teacher_width))


def _normed(width: int, out_width: int) -> nn.Sequential:
    """Returns a layer norm, GELU and a linear layer from `width` to `out_width` channels."""
    return nn.Sequential(nn.LayerNorm(width), nn.GELU(), nn.Linear(width, out_width))


def _block(width: int, *, heads: int, layer_scale: float, **options: object) -> nn.Module:
    """Returns a transformer block of timm.

    Args:
        width: Channels of the tokens.
        heads: Number of attention heads.
        layer_scale: Initial value of the layer scale.
        options: Further arguments of timm's `Block`.

    Raises: ConfigError: if the width is not a multiple of the number of attention heads.
    """
    if width % heads:
        raise ConfigError(
            f"{WHERE}: attention does not fit the student; got a width of {width}, expected a "
            f"multiple of its {heads} heads. Use the head mlp."
        )
    from timm.models.vision_transformer import Block  # Its import costs about a second.

    return Block(width, num_heads=heads, init_values=layer_scale, **options)
