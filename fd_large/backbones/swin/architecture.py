"""The fields of a Swin model (first version), and the models that have a name."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

from fd_large.recipes.family import WindowedTransformer


@dataclass(frozen=True, kw_only=True)
class SwinArchitecture(WindowedTransformer):
    """A Swin model of the first version, whose position tables are made for `image_size`."""

    family: ClassVar[str] = "swin"
    example: ClassVar[str] = "swin_base_esvit"

    def _check(self) -> None:
        super()._check()
        self._require(self.qkv_bias in ("none", "fused"), "qkv_bias", "'fused' or 'none'")


_BASE = SwinArchitecture(
    embed_dim=128,
    depths=(2, 2, 18, 2),
    num_heads=(4, 8, 16, 32),
    window_size=14,
    patch_size=4,
    image_size=224,
    mlp_ratio=4.0,
    qkv_bias="fused",
    patch_norm=True,
    absolute_position=False,
    norm_eps=1e-5,
)

MODELS = {
    "swin_base_esvit": _BASE,
    # The first three stages, 14x14 tokens of 512 channels at 224 px, as target of a ViT student.
    "swin_base_esvit_s3": replace(_BASE, depths=(2, 2, 18), num_heads=(4, 8, 16)),
}
