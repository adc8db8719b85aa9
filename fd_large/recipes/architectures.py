"""The table of named models: widths, depths, heads, windows, extra norms. Standard library only.

An `Architecture` is used twice: whole, as a line of the table, and sparse, as the overrides of a
recipe, where None means "as the named model has it".

Windows of the SwinV2 students follow the image size that each is meant for: 14 at 224 px (tiny to
large) and 12 at 192 px (1b, huge, giant), so that stages 3 and 4 are one window each. A recipe
that trains at another size sets `window_size`.

Sources: Liu et al., arXiv 2111.09883 (SwinV2; widths of tiny to large, huge, giant); its code
repository for the rest of tiny to large. Heads of huge and giant are not published: a head width
of 32 continues the rule of the smaller models. The 1.06B net's width 448 is inferred from the
parameter count of the public "giant" weights of the SimMIM scaling study.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields, replace
from typing import Literal

from fd_large.errors import ConfigError, nearest

Family = Literal["swinv2", "swin", "vit", "timm", "module"]


@dataclass(frozen=True, kw_only=True)
class Architecture:
    """The shape of a model; None: as the named model has it."""

    family: Family | None = None
    """swinv2, swin (first version), vit, timm (any backbone of timm, as a teacher) or module (a model
    of one's own, as a teacher); fixed by the named net."""
    embed_dim: int | None = None
    """Channels after the patch embedding; Swin models double them at every merging."""
    depths: tuple[int, ...] | None = None
    """Blocks of each stage; a ViT has one stage."""
    num_heads: tuple[int, ...] | None = None
    """Attention heads of each stage."""
    window_size: int | None = None
    """Side of an attention window in tokens; maps that are smaller are one window."""
    patch_size: int | None = None
    """Side of a patch in pixels."""
    image_size: int | None = None
    """Side in pixels that position tables are made for; other models take any size."""
    mlp_ratio: float | None = None
    """Hidden width of the MLP as a multiple of the width."""
    qkv_bias: Literal["none", "qv", "qkv", "fused"] | None = None
    """Which of query, key and value have a bias; fused: one vector for the three."""
    patch_norm: bool | None = None
    """A LayerNorm after the patch embedding."""
    patch_bias: bool | None = None
    """A bias in the patch embedding."""
    absolute_position: bool | None = None
    """A learned position embedding, added to the tokens."""
    pretrained_window_sizes: tuple[int, ...] | None = None
    """Window of each stage in pre-training, by which SwinV2's coordinates are scaled; 0: the
    present window."""
    extra_norm_every: int | None = None
    """A LayerNorm on the main path after every k-th block of a stage; 0: none."""
    shared_position_bias: bool | None = None
    """One SwinV2 position-bias MLP per stage in place of one per block."""
    class_token: bool | None = None
    """A CLS token before the patches."""
    distillation_token: bool | None = None
    """A second prefix token, after CLS (DeiT)."""
    keep_distillation_token: bool | None = None
    """Whether the distillation token stays in the feature map."""
    relative_position: Literal["none", "shared", "block"] | None = None
    """ViT table of relative positions: none, one for all blocks, or one per block."""
    layer_scale: float | None = None
    """Initial factor of the residual branches; 0: no such factor."""
    norm_eps: float | None = None
    """Added to the variance in LayerNorm."""
    activation: Literal["gelu", "quick_gelu"] | None = None
    """gelu: exact; quick_gelu: x sigmoid(1.702 x), OpenAI CLIP's."""
    pre_norm_layer: bool | None = None
    """A LayerNorm before the first block (CLIP)."""
    timm_name: str | None = None
    """timm's own name of a model of the timm family."""
    feature_stride: int | None = None
    """Pixels per token of the map that is taken from a model of the timm family."""
    function: str | None = None
    """package.file:function that returns a model of one's own, weights and all."""


_COMMON_FIELDS = {
    *("family", "embed_dim", "depths", "num_heads", "patch_size", "image_size", "mlp_ratio"),
    *("qkv_bias", "absolute_position", "norm_eps"),
}
# What each family knows: an override outside its set is refused instead of being ignored.
FIELDS: dict[str, frozenset[str]] = {
    "swin": frozenset(_COMMON_FIELDS | {"window_size", "patch_norm"}),
    "swinv2": frozenset(
        _COMMON_FIELDS
        | {"window_size", "patch_norm", "pretrained_window_sizes", "extra_norm_every"}
        | {"shared_position_bias"}
    ),
    "vit": frozenset(
        _COMMON_FIELDS
        | {"patch_bias", "class_token", "distillation_token", "keep_distillation_token"}
        | {"relative_position", "layer_scale", "activation", "pre_norm_layer"}
    ),
    "timm": frozenset({"family", "timm_name", "feature_stride"}),
    "module": frozenset({"family", "function"}),
}


def _swinv2(
    embed_dim: int,
    depths: tuple[int, ...],
    num_heads: tuple[int, ...],
    *,
    window_size: int,
    image_size: int,
    extra_norm_every: int = 0,
) -> Architecture:
    return Architecture(
        family="swinv2",
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


_SWIN_BASE = Architecture(
    family="swin",
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

_VIT_BASE = Architecture(
    family="vit",
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
_VIT_STUDENT = replace(
    _VIT_BASE, qkv_bias="qv", absolute_position=False, relative_position="shared", layer_scale=0.1
)

_CLIP_BASE = replace(
    _VIT_BASE, patch_bias=False, norm_eps=1e-5, activation="quick_gelu", pre_norm_layer=True
)

_LARGE_14 = {"embed_dim": 1024, "depths": (24,), "num_heads": (16,), "patch_size": 14}

ARCHITECTURES: dict[str, Architecture] = {
    "swinv2_tiny": _swinv2(96, (2, 2, 6, 2), (3, 6, 12, 24), window_size=14, image_size=224),
    "swinv2_small": _swinv2(96, (2, 2, 18, 2), (3, 6, 12, 24), window_size=14, image_size=224),
    "swinv2_base": _swinv2(128, (2, 2, 18, 2), (4, 8, 16, 32), window_size=14, image_size=224),
    "swinv2_large": _swinv2(192, (2, 2, 18, 2), (6, 12, 24, 48), window_size=14, image_size=224),
    "swinv2_1b": _swinv2(448, (2, 2, 18, 2), (14, 28, 56, 112), window_size=12, image_size=192),
    "swinv2_huge": _swinv2(
        352,
        (2, 2, 18, 2),
        (11, 22, 44, 88),
        window_size=12,
        image_size=192,
        extra_norm_every=6,
    ),
    "swinv2_giant": _swinv2(
        512,
        (2, 2, 42, 4),
        (16, 32, 64, 128),
        window_size=12,
        image_size=192,
        extra_norm_every=6,
    ),
    "swin_base_esvit": _SWIN_BASE,
    # The first three stages, 14x14 tokens of 512 channels at 224 px, as target of a ViT student.
    "swin_base_esvit_s3": replace(_SWIN_BASE, depths=(2, 2, 18), num_heads=(4, 8, 16)),
    "vit_base_patch16": _VIT_STUDENT,
    "vit_large_patch14": replace(_VIT_STUDENT, **_LARGE_14),
    "clip_vit_base_patch16": _CLIP_BASE,
    "clip_vit_large_patch14": replace(_CLIP_BASE, **_LARGE_14),
    "dino_vit_base_patch16": _VIT_BASE,
    "deit_vit_base_patch16": _VIT_BASE,
    "deit_distilled_vit_base_patch16": replace(_VIT_BASE, distillation_token=True),
    "efficientnet_lite0": Architecture(
        family="timm", timm_name="tf_efficientnet_lite0", feature_stride=8
    ),
    # Any other model of timm: --teacher.architecture.timm_name and .feature_stride.
    "timm": Architecture(family="timm", timm_name="resnet50", feature_stride=32),
}


def resolve(name: str, overrides: Architecture | None = None) -> Architecture:
    """Returns the named model with the overrides filled in; every field of its family is set.

    A family (vit, swin, swinv2, module) is a name too: of a model that the overrides describe whole.

    Raises: ConfigError: if the name is unknown, or an override does not fit the family or the
        other values.
    """
    if name not in ARCHITECTURES and name in FIELDS:
        return _from_fields_alone(name, overrides or Architecture())
    if name not in ARCHITECTURES:
        raise ConfigError(
            f"model: no such model; got {name!r}, {nearest(name, ARCHITECTURES)}. Use a listed name."
        )
    base = ARCHITECTURES[name]
    known = FIELDS[base.family]
    given = {k: v for k, v in asdict(overrides or Architecture()).items() if v is not None}
    for field_name, value in given.items():
        if field_name not in known:
            raise ConfigError(
                f"architecture.{field_name}: {name} is a {base.family} model without that option; "
                f"got {value!r}, {nearest(field_name, known)}. Leave it out."
            )
    if given.get("family", base.family) != base.family:
        raise ConfigError(
            f"architecture.family: fixed by the model {name}; got {given['family']!r}, expected "
            f"{base.family!r}. Name another net."
        )
    if "depths" in given and "pretrained_window_sizes" in known:
        # Another number of stages needs another number of zeros.
        given.setdefault("pretrained_window_sizes", (0,) * len(given["depths"]))
    architecture = replace(base, **given)
    _check(name, architecture)
    return architecture


def _from_fields_alone(family: Family, given: Architecture) -> Architecture:
    missing = sorted(
        field_name
        for field_name in FIELDS[family] - {"family"}
        if getattr(given, field_name) is None
    )
    if missing:
        raise ConfigError(
            f"model: {family} is a family, whose models have no values of their own; got none for "
            f"{', '.join(missing)}, expected every field. Set them by --teacher.architecture or "
            "--student.architecture, or name a net."
        )
    architecture = replace(given, family=family)
    _check(family, architecture)
    return architecture


def _check(name: str, a: Architecture) -> None:
    def require(ok: bool, field_name: str, expected: str) -> None:
        if not ok:
            got = getattr(a, field_name)
            raise ConfigError(
                f"architecture.{field_name}: does not fit {name}; got {got!r}, expected "
                f"{expected}. Change --student.architecture or --teacher.architecture."
            )

    if a.family == "timm":  # What timm has is known where timm is imported.
        require(a.feature_stride >= 1, "feature_stride", "a positive whole number")
        return
    if a.family == "module":
        module, colon, function = a.function.partition(":")
        require(bool(module and colon and function), "function", "package.file:function")
        return
    stages = len(a.depths)
    require(stages >= 1 and min(a.depths) >= 1, "depths", "one or more blocks in each stage")
    require(a.family != "vit" or stages == 1, "depths", "one number for a ViT")
    require(len(a.num_heads) == stages, "num_heads", f"{stages} numbers, as depths has")
    for field_name in ("embed_dim", "patch_size", "window_size", "image_size"):
        value = getattr(a, field_name)
        require(value is None or value >= 1, field_name, "a positive whole number")
    require(a.mlp_ratio > 0, "mlp_ratio", "a positive number")
    require(a.norm_eps > 0, "norm_eps", "a positive number")
    require(a.layer_scale is None or a.layer_scale >= 0, "layer_scale", "0 (none) or more")
    for stage, heads in enumerate(a.num_heads):
        width = a.embed_dim * 2**stage
        require(heads >= 1 and width % heads == 0, "num_heads", f"divisors of width {width}")
    if a.family == "swinv2":
        sizes = a.pretrained_window_sizes
        require(len(sizes) == stages, "pretrained_window_sizes", f"{stages} numbers")
        require(a.qkv_bias in ("none", "qv"), "qkv_bias", "'qv' or 'none'")
        require(a.extra_norm_every >= 0, "extra_norm_every", "0 or more blocks")
    if a.family == "swin":
        require(a.qkv_bias in ("none", "fused"), "qkv_bias", "'fused' or 'none'")


# The fields that any family knows are the fields that exist.
assert frozenset().union(*FIELDS.values()) == {f.name for f in fields(Architecture)}
