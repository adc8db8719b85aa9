"""What a configuration beside a weights file tells: transformers', timm's, open_clip's, ours."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from fd_large.backbones.statistics import Statistics
from fd_large.errors import WeightsError
from fd_large.recipes.architectures import Architecture

# Our own exports write their architecture under this key.
OWN = "fd_large"
_ACTIVATIONS = {"gelu": "gelu", "quick_gelu": "quick_gelu"}
_CLIP_HEAD_WIDTH = 64
_HF_TYPES = ("clip", "clip_vision_model", "vit", "deit", "beit", "swin", "swinv2")


class Beside(NamedTuple):
    """What was found.

    Attributes:
        architecture: None in fields that it does not tell.
        statistics: None where it does not tell.
        own: Whether our own export wrote it.
    """

    architecture: Architecture
    statistics: Statistics | None
    own: bool = False


def beside(path: Path, form: str, *, where: str = "weights") -> Beside:
    """Reads the configuration in a weights file's folder, if it is one of this format.

    Args:
        path: The weights file or index.
        form: Of the table in formats.py.
        where: What the user set, for messages.

    Raises: WeightsError: if it is damaged, or tells of something that no model here has.
    """
    try:
        return _beside(path, form, where)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise WeightsError(
            f"{where}: the configuration beside {path}: not what its format has; got "
            f"{type(error).__name__} {error}, expected the file as it was published. Fetch it "
            "again, or move it away and set --teacher.architecture.*."
        ) from error


def _beside(path: Path, form: str, where: str) -> Beside:
    config = _json(path.parent / "config.json", where)
    if OWN in config:
        found = config[OWN]
        return Beside(_own(path, found, where), _statistics(found, "mean", "std"), True)
    if form.startswith("hf_") and config.get("model_type") in _HF_TYPES:
        preprocessing = _json(path.parent / "preprocessor_config.json", where)
        return Beside(
            hugging_face(config, where=where), _statistics(preprocessing, "image_mean", "image_std")
        )
    if "architecture" in config and "pretrained_cfg" in config:
        from fd_large.weights import timm_config  # timm takes a second, which others are spared.

        return Beside(
            timm_config.of_config(config, where=where),
            _statistics(config["pretrained_cfg"], "mean", "std"),
        )
    config = _json(path.parent / "open_clip_config.json", where)
    if form.startswith("open_clip") and "model_cfg" in config:
        preprocessing = config.get("preprocess_cfg", {})
        return Beside(
            open_clip(config["model_cfg"], where=where), _statistics(preprocessing, "mean", "std")
        )
    return Beside(Architecture(), None)


def _own(path: Path, found: dict[str, Any], where: str) -> Architecture:
    values = found.get("architecture", {})
    try:
        return Architecture(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        )
    except TypeError as error:
        raise WeightsError(
            f"{where}: {path.parent / 'config.json'}: fields of no architecture; got {error}, "
            "expected what fd_large wrote. Use the release that wrote it."
        ) from error


def hugging_face(config: dict[str, Any], *, where: str = "weights") -> Architecture:
    """The fields of a `config.json` of transformers that names and shapes do not tell.

    Raises: WeightsError: for an activation that no model here has.
    """
    config = config.get("vision_config", config)
    swin = "window_size" in config
    activation = config.get("hidden_act")
    if activation is not None and activation not in _ACTIVATIONS:
        raise WeightsError(
            f"{where}: an activation that no model here has; got hidden_act {activation!r} in "
            f"config.json, expected one of {', '.join(_ACTIVATIONS)}. Use other weights."
        )
    own: dict[str, Any] = {
        "norm_eps": config.get("layer_norm_eps"),
        "image_size": config.get("image_size"),
    }
    if not swin:
        own["activation"] = activation and _ACTIVATIONS[activation]
        heads = config.get("num_attention_heads")
        own["num_heads"] = (heads,) if heads else None
        return Architecture(**own)
    window, side = config["window_size"], config["image_size"] // config["patch_size"]
    own["window_size"] = window
    if config.get("model_type") == "swinv2":
        stages = range(len(config["depths"]))
        given = tuple(config.get("pretrained_window_sizes", ())) or (0,) * len(stages)
        own["pretrained_window_sizes"] = tuple(
            given[s] or min(window, side // 2**s) for s in stages
        )
    return Architecture(**own)


def open_clip(config: dict[str, Any], *, where: str = "weights") -> Architecture:
    """The fields of an open_clip model configuration that names and shapes do not tell.

    Raises: WeightsError: for an activation that no model here has, in an image tower of timm.
    """
    vision = config.get("vision_cfg", {})
    if "timm_model_name" in vision:
        from fd_large.weights import timm_config

        told = timm_config.of_config({"architecture": vision["timm_model_name"]}, where=where)
        return replace(told, image_size=vision.get("image_size") or told.image_size)
    width = vision.get("width")
    return Architecture(
        num_heads=(width // vision.get("head_width", _CLIP_HEAD_WIDTH),) if width else None,
        image_size=vision.get("image_size"),
        activation="quick_gelu" if config.get("quick_gelu") else "gelu",
        norm_eps=1e-5,
    )


def _json(path: Path, where: str) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found = json.loads(path.read_text())
    except ValueError as error:
        raise WeightsError(
            f"{where}: {path}: not JSON; got {error}, expected a configuration of the weights. "
            "Mend the file, or move it away."
        ) from error
    return found if isinstance(found, dict) else {}


def _statistics(config: dict[str, Any], mean: str, std: str) -> Statistics | None:
    if mean not in config or std not in config:
        return None
    return Statistics(tuple(config[mean]), tuple(config[std]))
