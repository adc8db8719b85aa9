"""Named models to modules."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from fd_large.backbones.custom.custom import build_own
from fd_large.backbones.hierarchical import SizeRule
from fd_large.backbones.initialization import Initialization
from fd_large.backbones.swin.swin import Swin
from fd_large.backbones.swinv2.swinv2 import SwinV2
from fd_large.backbones.vit.vit import ViT
from fd_large.errors import ConfigError
from fd_large.kernels.window_attention_reference import Memory
from fd_large.recipes.architectures import Architecture, resolve

if TYPE_CHECKING:
    from fd_large.backbones.timm.adapter import TimmBackbone


def build(
    name: str,
    overrides: Architecture | None = None,
    *,
    drop_path_rate: float = 0.0,
    size_rule: SizeRule = "drop",
    attention_memory: Memory = "keep",
    sequential_stages: int = 0,
    residual_dtype: Literal["float32", "compute"] = "compute",
    initialization: Initialization = "fd",
    seed: int | None = None,
) -> SwinV2 | Swin | ViT | TimmBackbone | nn.Module:
    """Builds a named model; of timm's and the user's own only name, overrides and seed count.

    Args:
        name: Of the table in `recipes.architectures`.
        overrides: Fields that differ from the named net's; None: none.
        drop_path_rate: Of the last block; blocks before rise linearly from 0.
        size_rule: "drop" or "pad" image sizes that do not fit; only Swin models pad.
        attention_memory: "keep" or "recompute" attention maps for backward.
        sequential_stages: First stages of a SwinV2 of whose maps few windows' exist at a time.
        residual_dtype: "compute": that of the weights; "float32": at least that.
        initialization: "fd", "official" or "none" (zeros, for models whose weights are loaded).
        seed: Of the initial weights; None: torch's global CPU generator as it stands.

    Raises: ConfigError: for an unknown name or values that do not fit.
    """
    a = resolve(name, overrides)
    if size_rule == "pad" and a.family not in ("swin", "swinv2"):
        raise ConfigError(
            f"student.size_rule: {name} is a {a.family} model, which cannot pad; got 'pad', expected "
            "'drop'. Use an image size that fits."
        )
    if seed is not None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            return build(
                name,
                overrides,
                drop_path_rate=drop_path_rate,
                size_rule=size_rule,
                attention_memory=attention_memory,
                sequential_stages=sequential_stages,
                residual_dtype=residual_dtype,
                initialization=initialization,
            )
    if a.family == "timm":
        # timm takes a second to import, which other models are spared.
        from fd_large.backbones.timm.adapter import TimmBackbone

        return TimmBackbone(a.timm_name, stride=a.feature_stride)
    if a.family == "module":
        return build_own(a.function)
    shared = {
        "patch_size": a.patch_size,
        "image_size": a.image_size,
        "mlp_ratio": a.mlp_ratio,
        "absolute_position": a.absolute_position,
        "norm_eps": a.norm_eps,
        "drop_path_rate": drop_path_rate,
        "attention_memory": attention_memory,
        "residual_dtype": residual_dtype,
        "initialization": initialization,
    }
    if a.family == "swinv2":
        return SwinV2(
            a.embed_dim,
            a.depths,
            a.num_heads,
            window_size=a.window_size,
            qkv_bias=a.qkv_bias == "qv",
            patch_norm=a.patch_norm,
            pretrained_window_sizes=a.pretrained_window_sizes,
            extra_norm_every=a.extra_norm_every,
            shared_position_bias=a.shared_position_bias,
            size_rule=size_rule,
            sequential_stages=sequential_stages,
            **shared,
        )
    if a.family == "swin":
        return Swin(
            a.embed_dim,
            a.depths,
            a.num_heads,
            window_size=a.window_size,
            qkv_bias=a.qkv_bias == "fused",
            patch_norm=a.patch_norm,
            size_rule=size_rule,
            **shared,
        )
    return ViT(
        a.embed_dim,
        a.depths[0],
        a.num_heads[0],
        qkv_bias=a.qkv_bias,
        patch_bias=a.patch_bias,
        class_token=a.class_token,
        distillation_token=a.distillation_token,
        keep_distillation_token=a.keep_distillation_token,
        relative_position=a.relative_position,
        layer_scale=a.layer_scale,
        activation=a.activation,
        pre_norm_layer=a.pre_norm_layer,
        **shared,
    )
