"""Architecture class of timm's models, and those that have a short name in this project."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Self

from fd_large.files import parse_json
from fd_large.recipes.family import FamilyArchitecture, Kind, is_plain

# What published folders set beside a model's name; nothing among them names a file or a download.
ARGUMENTS = frozenset(
    [
        "act_layer",
        "class_token",
        "depth",
        "depths",
        "drop_path_rate",
        "drop_rate",
        "dynamic_img_size",
        "embed_dim",
        "fc_norm",
        "global_pool",
        "img_size",
        "in_chans",
        "init_values",
        "mlp_ratio",
        "no_embed_class",
        "num_classes",
        "num_heads",
        "patch_size",
        "pre_norm",
        "pretrained_window_sizes",
        "qkv_bias",
        "reg_tokens",
        "strict_img_size",
        "use_abs_pos_emb",
        "use_fc_norm",
        "use_rel_pos_bias",
        "use_shared_rel_pos_bias",
        "window_size",
    ]
)

# Parts of the names of models whose tokens attend to all others, or that mix them by an MLP.
_ATTENTION = re.compile(
    "vit|deit|beit|eva|cait|xcit|coat|volo|twins|tnt|pit_|pvt|hiera|aim|(?<!res)nest"
    "|(?<!conv)mixer|[gs]mlp"
)

_NO_MAP = {
    "coat_(tiny|mini|small)|crossvit_|efficientvim_": "gives several tensors, not one map",
    "pit_": "gives its class token alone",
    "inception_(v3|v4|resnet_v2)": "has a grid that does not follow from its stride",
}
"""Why a model of timm has no map, by patterns of names: docs/timm.md has all, as counted."""
_DRAWS = "sapiens2"


def why_refused(name: str) -> str:
    """Returns why timm's model `name` cannot be used at all, or only as a teacher, in words.

    Returns "" if no such reason is known. Lists of model names show the text; whether a model is
    accepted is decided only when it is built.
    """
    for pattern, reason in _NO_MAP.items():
        if re.match(pattern, name):
            return f"refused: it {reason}"
    if _DRAWS in name:
        return "only as a teacher: it draws random numbers of its own in training"
    return ""


def strange_arguments(arguments: Mapping[str, Any]) -> list[str]:
    """Returns the sorted names of the arguments that are refused, and never passed on to timm.

    An argument is refused if its name is not in `ARGUMENTS`, or its value is not None, a bool, a
    bounded number, a short text or a short list of these.
    """
    return sorted(
        name
        for name, value in arguments.items()
        if name not in ARGUMENTS or not is_plain(value, counts_blocks=name in ("depth", "depths"))
    )


def with_arguments(name: str, arguments: Mapping[str, Any]) -> str:
    """Returns `name`, timm's name of a model, followed by `arguments` as JSON if there are any."""
    return name + json.dumps(arguments, sort_keys=True) if arguments else name


def split_arguments(timm_name: str) -> tuple[str, dict[str, Any]]:
    """Splits `timm_name` into timm's name of a model and the {argument: value} in JSON after it.

    The dict is empty if nothing follows the name.

    Raises: ValueError: if what follows the name is not JSON.
    """
    name, mark, rest = timm_name.partition("{")
    return name, parse_json(mark + rest) if mark else {}


@dataclass(frozen=True, kw_only=True)
class TimmArchitecture(FamilyArchitecture):
    """A timm model up to the map at a stride; its name is checked where timm is imported.

    Attributes:
        timm_name: Name of the model in timm. Arguments that differ from timm's defaults follow the
            name as JSON, `vit_base_patch16_224{"global_pool": "avg"}`.
        feature_stride: Stride in pixels of the map that is used. 0: the last map.
        image_size: Side in pixels of the images for which position tables are made; models
            without tables take any size.
    """

    timm_name: str
    feature_stride: int = 0
    image_size: int = 0

    family: ClassVar[str] = "timm"
    prefix: ClassVar[str] = "timm:"
    example: ClassVar[str] = "timm"
    whole_first: ClassVar[bool] = True
    has_batch_norms: ClassVar[bool] = True
    resizes_positions: ClassVar[bool] = True

    @classmethod
    def named(cls, rest: str) -> Self:
        """Returns the architecture of the timm model `rest` up to its last map."""
        return cls(timm_name=rest)

    @property
    def kind(self) -> Kind:
        """The operation that mixes tokens: "windows", "attention" or "convolutions".

        It is guessed from timm's name of the model.
        """
        if "swin" in self.timm_name:
            return "windows"
        return "attention" if _ATTENTION.search(self.timm_name) else "convolutions"

    @property
    def own_name(self) -> str:
        """The model's name in the form `timm:NAME`."""
        return f"{self.prefix}{self.timm_name}"

    def at(self, image_size: int) -> Self:
        """Returns the same model for images of `image_size` pixels a side."""
        return replace(self, image_size=image_size)

    def _check(self) -> None:
        try:
            name, arguments = split_arguments(self.timm_name)
        except ValueError:
            name, arguments = "", {}
        self._require(bool(name), "timm_name", "a name of timm.list_models(), and JSON or nothing")
        self._require(
            not strange_arguments(arguments),
            "timm_name",
            f"plain values of {', '.join(sorted(ARGUMENTS))} after the name",
        )
        self._require(self.feature_stride >= 0, "feature_stride", "a positive whole number, or 0")
        self._require(self.image_size >= 0, "image_size", "a positive whole number, or 0")


MODELS = {
    "efficientnet_lite0": TimmArchitecture(timm_name="tf_efficientnet_lite0", feature_stride=8),
    "timm": TimmArchitecture(timm_name="resnet50", feature_stride=32),
}
