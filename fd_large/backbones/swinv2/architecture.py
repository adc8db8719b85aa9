"""The fields of a SwinV2 model, and the models that have a name.

The side of a window of a named model follows the image size for which the model is meant: 14 tokens
at 224 px (tiny to large) and 12 tokens at 192 px (1b, huge, giant). A map of stage 3 is then a
single window, and so is a map of stage 4. A recipe that trains at another image size sets
`window_size`.

Sources: Liu et al., arXiv 2111.09883 (widths of tiny to large, huge, giant); the paper's code
repository for the other fields of tiny to large. The number of heads of huge and giant is not
published: a head width of 32 continues the rule of the smaller models. The width 448 of the model
of 1.06B parameters is inferred from the parameter count of the public "giant" weights of the SimMIM
scaling study.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from fd_large.recipes.family import WindowedTransformer


@dataclass(frozen=True, kw_only=True)
class SwinV2Architecture(WindowedTransformer):
    """A SwinV2 model.

    Attributes:
        pretrained_window_sizes: Side in tokens of a window in pre-training, a number for each
            stage. It scales the coordinates of the position biases. 0: the side of the window that
            is in use.
        extra_norm_every: Interval k in blocks: a LayerNorm on the main path follows every k-th
            block of a stage. 0: there are no such norms.
        shared_position_bias: Whether the blocks of a stage share one position-bias MLP. False: each
            block has its own.
    """

    pretrained_window_sizes: tuple[int, ...]
    extra_norm_every: int
    shared_position_bias: bool

    family: ClassVar[str] = "swinv2"
    example: ClassVar[str] = "swinv2_base"
    has_sequential_stages: ClassVar[bool] = True
    has_stage_windows: ClassVar[bool] = True

    def _check(self) -> None:
        super()._check()
        stages = len(self.depths)
        self._require(
            len(self.pretrained_window_sizes) == stages,
            "pretrained_window_sizes",
            f"{stages} numbers",
            "depths",
        )
        self._require(self.qkv_bias in ("none", "qv"), "qkv_bias", "'qv' or 'none'")
        self._require(self.extra_norm_every >= 0, "extra_norm_every", "0 or more blocks")

    def at(self, image_size: int) -> Self:
        """Returns the same model for images of `image_size` pixels a side.

        A model with absolute positions is returned unchanged.
        """
        return self if self.absolute_position else replace(self, image_size=image_size)

    def overridden(self, values: dict[str, Any]) -> Self:
        """Returns the model with other values of some fields.

        If `depths` is among the values and `pretrained_window_sizes` is not, the latter becomes 0
        for every stage.

        Args:
            values: {field: new value}.

        Raises: ConfigError: if the values do not fit the other fields.
        """
        if "depths" in values:
            values = {"pretrained_window_sizes": (0,) * len(values["depths"]), **values}
        return replace(self, **values)

    def with_window(self, window_size: int) -> Self:
        """Returns a trained model for windows with a side of `window_size` tokens.

        The coordinates of the position biases stay scaled by the windows of the training, since
        `pretrained_window_sizes` of the result has these windows. To use a model on larger images,
        call this method also with an unchanged `window_size`: in training, the window of a stage
        was at most as large as the stage's map, which is now larger.
        """
        trained = trained_windows(
            self.pretrained_window_sizes, self.window_size, self.image_size // self.patch_size
        )
        return replace(self, window_size=window_size, pretrained_window_sizes=trained)

    def with_own_position_biases(self) -> Self:
        """Returns the model with a position-bias MLP in every block, none of which blocks share."""
        return replace(self, shared_position_bias=False)

    @property
    def has_extra_norms(self) -> bool:
        """Whether any block ends with a norm on the main path."""
        return 0 < self.extra_norm_every <= max(self.depths)


def trained_windows(
    stated: tuple[int, ...], window_size: int, tokens_a_side: int
) -> tuple[int, ...]:
    """Returns for each stage the side of a window by which a trained model scales its coordinates.

    These are the coordinates of the position biases; sides are in tokens. A stated side other than
    0 is kept. A stated 0 becomes the smaller of `window_size` and the side of the stage's map, or
    stays 0 if that is 1, since a window of one token has no distances to scale.

    Args:
        stated: `pretrained_window_sizes` of the model, one side for each stage.
        window_size: Side of a window in training, in tokens.
        tokens_a_side: Side of the first stage's map in training, in tokens.
    """
    windows = [min(window_size, tokens_a_side // 2**stage) for stage in range(len(stated))]
    # Within windows of one token there is no distance to scale.
    return tuple(
        before or (window if window > 1 else 0)
        for before, window in zip(stated, windows, strict=True)
    )


def _swinv2(
    embed_dim: int,
    depths: tuple[int, ...],
    num_heads: tuple[int, ...],
    *,
    window_size: int,
    image_size: int,
    extra_norm_every: int = 0,
) -> SwinV2Architecture:
    return SwinV2Architecture(
        embed_dim=embed_dim,
        depths=depths,
        num_heads=num_heads,
        window_size=window_size,
        patch_size=4,
        image_size=image_size,
        mlp_ratio=4.0,
        qkv_bias="qv",
        patch_norm=True,
        absolute_position=False,
        norm_eps=1e-5,
        pretrained_window_sizes=(0,) * len(depths),
        extra_norm_every=extra_norm_every,
        shared_position_bias=False,
    )


_SMALL = (2, 2, 18, 2)
_AT_224 = {"window_size": 14, "image_size": 224}
_AT_192 = {"window_size": 12, "image_size": 192}

MODELS = {
    "swinv2_tiny": _swinv2(96, (2, 2, 6, 2), (3, 6, 12, 24), **_AT_224),
    "swinv2_small": _swinv2(96, _SMALL, (3, 6, 12, 24), **_AT_224),
    "swinv2_base": _swinv2(128, _SMALL, (4, 8, 16, 32), **_AT_224),
    "swinv2_large": _swinv2(192, _SMALL, (6, 12, 24, 48), **_AT_224),
    "swinv2_1b": _swinv2(448, _SMALL, (14, 28, 56, 112), **_AT_192),
    "swinv2_huge": _swinv2(352, _SMALL, (11, 22, 44, 88), extra_norm_every=6, **_AT_192),
    "swinv2_giant": _swinv2(512, (2, 2, 42, 4), (16, 32, 64, 128), extra_norm_every=6, **_AT_192),
}
