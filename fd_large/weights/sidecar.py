"""The configuration beside a weights file: transformers', timm's, open_clip's or our own."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fd_large.backbones.published import Published
from fd_large.backbones.statistics import Statistics
from fd_large.errors import WeightsError
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.family import FamilyArchitecture
from fd_large.weights.read import read_json

# Our own exports write their architecture under this key.
OWN = "fd_large"


class Sidecar(NamedTuple):
    """What a configuration states.

    Attributes:
        architecture: None in fields that it does not state.
        statistics: None where it does not state them.
        own: Whether our own export wrote it.
        code_hash: SHA-256 of the file of the user's own that made the model; empty: none did.
    """

    architecture: Architecture
    statistics: Statistics | None
    own: bool = False
    code_hash: str = ""


def read_sidecar(path: Path, published: Published, library: str, where: str) -> Sidecar:
    """Reads the configuration in a weights file's folder, if there is one that goes with it.

    Args:
        path: The weights file or index.
        published: What the file's family says of its files.
        library: The one whose configuration goes with the file's format; "" is none.
        where: What the user set, for messages.

    Raises: WeightsError: if it is damaged, or describes something that no model here has.
    """
    try:
        return _read(path.parent, published, library, where)
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        raise WeightsError(
            f"{where}: the configuration beside {path}: not what its format has; got "
            f"{type(error).__name__} {error}, expected the file as it was published. Fetch it "
            "again, or move it away and set --teacher.architecture.*."
        ) from error


def _read(folder: Path, published: Published, library: str, where: str) -> Sidecar:
    if own := read_own(folder, where):
        return own
    config = _json(folder / "config.json", where)
    if library == "hf" and (stated := published.configs["hf"](config, where)) is not None:
        preprocessing = _json(folder / "preprocessor_config.json", where)
        return Sidecar(stated, _statistics(preprocessing, "image_mean", "image_std"))
    if "architecture" in config and "pretrained_cfg" in config:
        stated = described(published, "timm", config, where)
        return Sidecar(stated, _statistics(config["pretrained_cfg"]))
    config = _json(folder / "open_clip_config.json", where)
    if library == "open_clip" and "model_cfg" in config:
        stated = described(published, "open_clip", config["model_cfg"], where)
        return Sidecar(stated, _statistics(config.get("preprocess_cfg", {})))
    return Sidecar(Architecture(), None)


def read_own(folder: Path, where: str) -> Sidecar | None:
    """Reads what our own export wrote beside its weights; None if the folder holds nothing of it.

    Raises: WeightsError: if it is damaged.
    """
    own = _json(folder / "config.json", where).get(OWN)
    if not own:
        return None
    code_hash = own.get("code_sha256", "")
    return Sidecar(_own(folder, own, where), _statistics(own), own=True, code_hash=code_hash)


def own_config(
    architecture: FamilyArchitecture, statistics: Statistics | None, *, code_hash: str = ""
) -> dict[str, dict[str, Any]]:
    """Returns the config.json of our own exports; see `Sidecar`."""
    own: dict[str, Any] = {"architecture": architecture.values()}
    if statistics is not None:
        own |= {"mean": list(statistics.mean), "std": list(statistics.std)}
    if code_hash:
        own["code_sha256"] = code_hash
    return {OWN: own}


def described(published: Published, library: str, config: Any, where: str) -> Architecture:
    """Returns what a library's configuration states about a model; nothing for another kind.

    Args:
        published: What the model's family says of its files.
        library: "timm", with a config.json or a module; "open_clip", with a model configuration.
        config: The configuration.
        where: What the user set, for messages.

    Raises: WeightsError: for an activation that no model here has.
    """
    if library == "open_clip" and "timm_model_name" in config.get("vision_cfg", {}):
        vision = config["vision_cfg"]
        stated = described(published, "timm", {"architecture": vision["timm_model_name"]}, where)
        return replace(stated, image_size=vision.get("image_size") or stated.image_size)
    if library == "timm" and isinstance(config, dict):
        config = _timm_module(config)
    reader = published.configs.get(library)
    stated = None if reader is None or config is None else reader(config, where)
    return stated or Architecture()


def _timm_module(config: dict[str, Any]) -> Any:
    """The module of a timm configuration, without memory; None if timm has none of that name."""
    import timm  # A second that other files are spared.

    if not timm.is_model(config["architecture"]):
        return None
    with torch.device("meta"):
        return timm.create_model(config["architecture"], **config.get("model_args", {}))


def _own(folder: Path, found: dict[str, Any], where: str) -> Architecture:
    values = found.get("architecture", {})
    try:
        return Architecture(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        )
    except TypeError as error:
        raise WeightsError(
            f"{where}: {folder / 'config.json'}: fields of no architecture; got {error}, "
            "expected what fd_large wrote. Use the release that wrote it."
        ) from error


def _json(path: Path, where: str) -> dict[str, Any]:
    if not path.is_file():
        return {}
    found = read_json(path, where=where)
    return found if isinstance(found, dict) else {}


def _statistics(config: dict[str, Any], mean: str = "mean", std: str = "std") -> Statistics | None:
    if mean not in config or std not in config:
        return None
    return Statistics(tuple(config[mean]), tuple(config[std]))
