"""The fields of a vision transformer, and the models that have a name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, Self

from fd_large.recipes.family import Transformer


@dataclass(frozen=True, kw_only=True)
class ViTArchitecture(Transformer):
    """A vision transformer.

    Attributes:
        patch_bias: Whether the patch embedding has a bias.
        class_token: Whether a CLS token precedes the patches.
        distillation_token: Whether a second prefix token follows the CLS token, as in DeiT.
        keep_distillation_token: Whether the distillation token stays in the feature map.
        class_position: Whether CLS and distillation token have an absolute position embedding too.
        num_registers: Number of registers, learnt tokens between the prefix tokens and the patches.
            Registers take part in attention, but have no absolute position and are left out of the
            feature map.
        relative_position: Tables of relative positions. "none": no table. "shared": one table for
            all blocks. "block": a table for each block.
        layer_scale: Initial value of the learnt factors of the residual branches, one factor per
            channel. 0: there are no such factors.
        activation: Activation of the MLPs. "gelu": the exact GELU. "quick_gelu": x
            sigmoid(1.702 x), as in OpenAI's CLIP.
        pre_norm_layer: Whether a LayerNorm precedes the first block, as in CLIP.
    """

    patch_bias: bool
    class_token: bool
    distillation_token: bool
    keep_distillation_token: bool
    relative_position: Literal["none", "shared", "block"]
    layer_scale: float
    activation: Literal["gelu", "quick_gelu"]
    pre_norm_layer: bool
    class_position: bool = True
    num_registers: int = 0

    family: ClassVar[str] = "vit"
    example: ClassVar[str] = "vit_base_patch16"
    mean_norm: ClassVar[Literal["none", "instead", "also"]] = "instead"
    resizes_positions: ClassVar[bool] = True

    def _check(self) -> None:
        self._require(len(self.depths) == 1, "depths", "one number for a ViT")
        super()._check()
        self._require(self.layer_scale >= 0, "layer_scale", "0 (none) or more")
        self._require(self.num_registers >= 0, "num_registers", "0 or more tokens")
        has_tables = self.relative_position != "none"
        self._require(
            not self.distillation_token or (self.class_token and not has_tables),
            "distillation_token",
            "False without a class token, or with relative positions",
            "class_token",
            "relative_position",
        )

    @property
    def num_prefix_tokens(self) -> int:
        """Number of tokens of the feature map before its patches, from 0 to 2.

        These are the class token, and the distillation token if `keep_distillation_token`.
        """
        keeps_distillation = self.distillation_token and self.keep_distillation_token
        return int(self.class_token) + int(keeps_distillation)

    @property
    def fixed_image_size(self) -> int:
        """Side in pixels of the only images that the model takes; 0 if it takes any size.

        Without positions the model takes any size that is a multiple of the patch.
        """
        has_positions = self.absolute_position or self.relative_position != "none"
        return self.image_size if has_positions else 0

    def at(self, image_size: int) -> Self:
        """Returns the same model with position tables for images of `image_size` pixels a side."""
        return replace(self, image_size=image_size)

    def with_own_position_biases(self) -> Self:
        """Returns the model with a table of relative positions in each block.

        A model without a table that all blocks share is returned unchanged.
        """
        shared = self.relative_position == "shared"
        return replace(self, relative_position="block") if shared else self


_BASE = ViTArchitecture(
    embed_dim=768,
    depths=(12,),
    num_heads=(12,),
    patch_size=16,
    image_size=224,
    mlp_ratio=4.0,
    qkv_bias="fused",
    patch_bias=True,
    absolute_position=True,
    class_token=True,
    distillation_token=False,
    keep_distillation_token=False,
    relative_position="none",
    layer_scale=0.0,
    norm_eps=1e-6,
    activation="gelu",
    pre_norm_layer=False,
)
# Students of the paper: relative positions in one table for all blocks and none absolute.
_STUDENT = replace(
    _BASE, qkv_bias="qv", absolute_position=False, relative_position="shared", layer_scale=0.1
)
_CLIP = replace(
    _BASE, patch_bias=False, norm_eps=1e-5, activation="quick_gelu", pre_norm_layer=True
)
_LARGE_14 = {"embed_dim": 1024, "depths": (24,), "num_heads": (16,), "patch_size": 14}

MODELS = {
    "vit_base_patch16": _STUDENT,
    "vit_large_patch14": replace(_STUDENT, **_LARGE_14),
    "clip_vit_base_patch16": _CLIP,
    "clip_vit_large_patch14": replace(_CLIP, **_LARGE_14),
    "dino_vit_base_patch16": _BASE,
    "deit_vit_base_patch16": _BASE,
    "deit_distilled_vit_base_patch16": replace(_BASE, distillation_token=True),
}
