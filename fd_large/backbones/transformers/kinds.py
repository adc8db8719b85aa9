"""A fixed table of the supported models of transformers, and checks of their configurations.

A model is built only by transformers' own class of its type; code in a model's repository is never
run. From a configuration only the type's own fields with plain values are taken, so that no value
names a file, a download or a kernel.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from packaging.version import Version

from fd_large.backbones.statistics import IMAGENET, Statistics
from fd_large.errors import VersionError, WeightsError, nearest
from fd_large.recipes.family import is_plain

OLDEST = "5.3"
"""The first release that is not known to run code because a model's folder or its name says so:
CVE-2026-4372 (config.json names a kernel of the hub, which is fetched and imported), CVE-2026-5241
and CVE-2026-1839. The lower bound of the extra in pyproject.toml, which is tested, is later."""

HALF = Statistics((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))


@dataclass(frozen=True, kw_only=True)
class Kind:
    """A supported type of model.

    Attributes:
        config: Name of transformers' class of the configuration.
        model: Name of transformers' class of the model.
        nested: Key of this model's part of the configuration, if the type is a model of images and
            texts; else "".
        without: Fields of the configuration that leave out modules after the map.
        arguments: Arguments of the class `model` that leave out modules after the map.
        norm_of_mean: Name of the module that normalises the mean of the map, or "".
        asks_to_resize: Whether positions are resized only if an argument of `forward` asks for it.
        class_tokens: Number of tokens of the map before registers and patches.
        statistics: Image statistics that most published models were trained with.
    """

    config: str
    model: str
    nested: str = ""
    without: Mapping[str, Any] = field(default_factory=dict)
    arguments: Mapping[str, Any] = field(default_factory=dict)
    norm_of_mean: str = ""
    asks_to_resize: bool = False
    class_tokens: int = 0
    statistics: Statistics = IMAGENET


def _of_name(name: str, **more: Any) -> Kind:
    return Kind(config=f"{name}Config", model=f"{name}Model", **more)


_SIGLIP = {"without": {"vision_use_head": False}, "statistics": HALF}
KINDS = {
    "dinov2": _of_name("Dinov2", class_tokens=1),
    "dinov2_with_registers": _of_name("Dinov2WithRegisters", class_tokens=1),
    "dinov3_vit": _of_name("DINOv3ViT", class_tokens=1),
    # The mean of its patches stands before them, as a class token does.
    "dinov3_convnext": _of_name("DINOv3ConvNext", class_tokens=1),
    "siglip": _of_name("SiglipVision", nested="vision_config", asks_to_resize=True, **_SIGLIP),
    "siglip_vision_model": _of_name("SiglipVision", asks_to_resize=True, **_SIGLIP),
    "siglip2": _of_name("Siglip2Vision", nested="vision_config", **_SIGLIP),
    "siglip2_vision_model": _of_name("Siglip2Vision", **_SIGLIP),
    "convnext": _of_name("ConvNext", norm_of_mean="layernorm"),
    "convnextv2": _of_name("ConvNextV2", norm_of_mean="layernorm"),
    "ijepa": _of_name("IJepa", asks_to_resize=True),
    "hiera": _of_name("Hiera", asks_to_resize=True, arguments={"add_pooling_layer": False}),
}


TEXT_KINDS = {
    "clip": Kind(
        config="CLIPTextConfig", model="CLIPTextModelWithProjection", nested="text_config"
    ),
    "siglip": _of_name("SiglipText", nested="text_config"),
    "siglip2": _of_name("Siglip2Text", nested="text_config"),
}
"""The text towers of models of image and text, by the `model_type` of the whole."""


def kind_of(name: str, where: str) -> Kind:
    """Returns the entry of the table of supported models for transformers' `model_type` `name`.

    Raises:
        WeightsError: If models of this type are not supported as teachers; the message begins with
            `where`.
    """
    if name not in KINDS:
        raise WeightsError(
            f"{where}: a model of transformers that cannot be a teacher here; got model_type "
            f"{name[:100]!r}, {nearest(name, KINDS)}. Use one of these, or timm:NAME if timm has "
            "the model."
        )
    return KINDS[name]


def library(where: str) -> Any:
    """Imports the package transformers and returns it.

    Raises:
        WeightsError: If transformers is not installed; the message begins with `where`.
        VersionError: If the installed release is too old; the message begins with `where`.
    """
    try:
        import transformers
    except ImportError as error:
        raise WeightsError(
            f"{where}: transformers is not installed; got a folder of one of its models, expected "
            "the package. Run pip install 'fd_large[transformers]'."
        ) from error
    if Version(transformers.__version__) < Version(OLDEST):
        raise VersionError(
            f"{where}: a release of transformers that is too old, and may run code named in a "
            f"model's folder; got {transformers.__version__}, expected {OLDEST} or later. Run pip "
            "install 'fd_large[transformers]'."
        )
    return transformers


def fields_of(model_type: str, config: Mapping[str, Any], where: str) -> tuple[str, list[str]]:
    """Returns the fields in a configuration that define the model, and names of unknown fields.

    Args:
        model_type: The `model_type` of the configuration.
        config: Contents of config.json.
        where: Field that the user set, for messages.

    Returns: the known fields of the type's configuration as JSON, and the sorted names of other
        fields, except those that do not change the model.
    Raises:
        WeightsError: If models of the type are not supported, or for values that no published model
            has.
    """
    return fields_of_kind(kind_of(model_type, where), config, where)


def fields_of_kind(kind: Kind, config: Mapping[str, Any], where: str) -> tuple[str, list[str]]:
    """Returns the fields in a configuration that define the model, and names of unknown fields.

    Args:
        kind: The type of the model.
        config: Contents of config.json.
        where: Field that the user set, for messages.

    Returns: the known fields of the type's configuration as JSON, and the sorted names of other
        fields, except those that do not change the model.
    Raises: WeightsError: for values that no published model has.
    """
    from inspect import signature

    package = library(where)
    vision = config.get(kind.nested, {}) if kind.nested else config
    if not isinstance(vision, Mapping):
        vision = {}
    of_all = signature(package.PretrainedConfig).parameters
    kind_fields = {
        name
        for name in signature(getattr(package, kind.config)).parameters
        if name not in of_all and not name.startswith("_")
    }
    values = {name: value for name, value in vision.items() if name in kind_fields}
    for name, value in values.items():
        if not is_plain(value, counts_blocks=name in _COUNTS):
            raise WeightsError(
                f"{where}: config.json: {name}: not a value of a published model; got "
                f"{str(value)[:100]}, expected one plain value or a short list, and no more "
                "layers than published models have. Fetch the folder again."
            )
    others = [name for name in vision if name not in kind_fields | _NO_MATTER]
    return json.dumps(values, sort_keys=True), sorted(others)


_COUNTS = ("depths", "num_hidden_layers", "num_register_tokens", "num_stages")
# Fields on files, outputs and training, which do not change what the model computes.
_NO_MATTER = {"architectures", "auto_map", "initializer_factor", "model_type", "num_labels"}
