"""The configuration beside a weights file: transformers', timm's, open_clip's or our own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from fd_large.backbones.family import Family
from fd_large.backbones.published import Published
from fd_large.backbones.registry import FAMILIES
from fd_large.backbones.statistics import Statistics
from fd_large.backbones.timm.architecture import ARGUMENTS, strange_arguments
from fd_large.errors import ConfigError, WeightsError, first_line
from fd_large.files import kind_of, parse_json
from fd_large.recipes.architectures import Architecture, field_names, set_fields, whole
from fd_large.recipes.family import MOST_BLOCKS, FamilyArchitecture
from fd_large.weights.read import read_json

# Our own exports write their architecture under this key.
OWN = "fd_large"
_FILES_OF_LIBRARIES = (".safetensors", ".bin", ".json")


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
    with _plain_errors(path.parent, where):
        return _read(path.parent, published, library, where)


def _read(folder: Path, published: Published, library: str, where: str) -> Sidecar:
    if own := read_own(folder, where):
        return own
    config = _json(folder / "config.json", where)
    said = _library_of(config)
    if said == "timm" or (said and said == library):
        reader = _family_that_reads(config, where)
        if reader is None or reader.published is not published:
            raise WeightsError(
                f"{where}: {folder / 'config.json'}: another model than one with these names of "
                f"tensors; got {_called(config)}, expected the model of the file. --teacher.model "
                "auto takes the model of the folder as a teacher; --student.model timm:NAME is a "
                "student of timm. If the file does not belong there, move it away."
            )
        stated = _stated(published, said, config, where) or Architecture()
        return Sidecar(stated, _statistics_of(folder, config, where))
    config = _json(folder / "open_clip_config.json", where)
    if library == "open_clip" and "model_cfg" in config:
        stated = described(published, "open_clip", config["model_cfg"], where)
        return Sidecar(stated, _statistics(config.get("preprocess_cfg", {})))
    return Sidecar(Architecture(), None)


class Described(NamedTuple):
    """A model that a library's configuration names, and that the library's own module is.

    Attributes:
        architecture: The fields that the configuration sets.
        statistics: None where it does not state them.
        family: The family that builds it.
        read_here: Whether a family here reads its tensors by their names as well, and adds a norm
            of the tokens, which the library's module does not have.
    """

    architecture: Architecture
    statistics: Statistics | None
    family: Family
    read_here: bool = False


def read_library(path: Path, where: str) -> Described | None:
    """Reads which library's model a folder is by its config.json; None for models read by names.

    Args:
        path: The folder, or a weights file in it as libraries write them.
        where: What the user set, for messages.

    Raises: WeightsError: if the configuration is damaged, or names a model that nothing here reads.
    """
    folder = path if kind_of(path) == "folder" else path.parent
    if kind_of(path) != "folder" and path.suffix not in _FILES_OF_LIBRARIES:
        return None
    config = _json(folder / "config.json", where)
    if OWN in config or not _library_of(config):
        return None
    with _plain_errors(folder, where):
        read_here = _family_that_reads(config, where) is not None
        # transformers' wrapper of timm's models writes its own name before timm's.
        is_wrapped = config.get("model_type") == "timm_wrapper"
        if read_here and not is_wrapped and not _lacks_norm(config, where):
            return None
        for family in FAMILIES.values():
            if family.of_config and (found := family.of_config(config, where)) is not None:
                return Described(found, _statistics_of(folder, config, where), family, read_here)
    raise WeightsError(
        f"{where}: {folder / 'config.json'}: a model that nothing here reads; got "
        f"{_called(config)}, expected one that docs/weights.md lists. If timm has this model, set "
        "--teacher.source timm:NAME."
    )


@contextmanager
def _plain_errors(folder: Path, where: str) -> Iterator[None]:
    """Says in one sentence what is wrong in a configuration."""
    try:
        yield
    except (
        ArithmeticError,
        AttributeError,
        LookupError,
        RuntimeError,
        TypeError,
        ValueError,
    ) as error:
        raise WeightsError(
            f"{where}: the configuration in {folder}: not what its format has; got "
            f"{type(error).__name__} {error}, expected the file as it was published. Fetch it "
            "again, or move it away and set --teacher.architecture.*."
        ) from error


def _library_of(config: dict[str, Any]) -> str:
    """The library whose configuration this is; "" if it is no library's."""
    if isinstance(config.get("architecture"), str):
        return "timm"
    return "hf" if isinstance(config.get("model_type"), str) else ""


def _lacks_norm(config: dict[str, Any], where: str) -> bool:
    """Whether a configuration is of a model of timm without a norm of its tokens.

    Most of these have one of the mean of the tokens, for the head (`fc_norm`).
    """
    if _library_of(config) != "timm":
        return False
    return isinstance(getattr(_timm_module(config, where), "norm", None), nn.Identity)


def _called(config: dict[str, Any]) -> str:
    if _library_of(config) == "timm":
        return f"timm's {config['architecture'][:100]!r}"
    return f"transformers' {config['model_type'][:100]!r}"


def _family_that_reads(config: dict[str, Any], where: str) -> Family | None:
    """The family whose published names the model of a configuration has."""
    library = _library_of(config)
    for family in FAMILIES.values():
        if family.published and _stated(family.published, library, config, where) is not None:
            return family
    return None


def _stated(published: Published, library: str, config: Any, where: str) -> Architecture | None:
    """What a configuration says of a model; None where it describes another family's."""
    reader = published.configs.get(library)
    if library == "timm" and isinstance(config, dict):
        config = _timm_module(config, where)
    return None if reader is None or config is None else reader(config, where)


def _statistics_of(folder: Path, config: dict[str, Any], where: str) -> Statistics | None:
    if _library_of(config) == "timm":
        # Folders of old releases have these fields at the top.
        return _statistics(config.get("pretrained_cfg", config))
    preprocessing = _json(folder / "preprocessor_config.json", where)
    return _statistics(preprocessing, "image_mean", "image_std")


def read_own(folder: Path, where: str) -> Sidecar | None:
    """Reads what our own export wrote beside its weights; None if the folder holds nothing of it.

    Raises: WeightsError: if it is damaged.
    """
    own = _json(folder / "config.json", where).get(OWN)
    if not own:
        return None
    with _plain_errors(folder, where):
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
    return _stated(published, library, config, where) or Architecture()


def _timm_module(config: dict[str, Any], where: str) -> Any:
    """The module of a timm configuration, without memory; None if timm has none of that name.

    Raises: WeightsError: for arguments that no published folder has, or that timm refuses.
    """
    arguments = config.get("model_args") or {}
    if unknown := strange_arguments(arguments):
        raise WeightsError(
            f"{where}: config.json: an argument of timm's models that is not passed on; got "
            f"model_args {', '.join(unknown)[:200]}, expected plain values, no larger than models "
            f"have, of {', '.join(sorted(ARGUMENTS))}. Remove it, or set --teacher.source "
            "timm:NAME."
        )
    text = json.dumps(arguments, sort_keys=True)
    try:
        return _made_by_timm(config["architecture"], text)
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{where}: config.json: timm cannot make this model; got {first_line(error)} for "
            f"{_called(config)} with {text[:200]}, expected a folder as timm writes it. Fetch it "
            "again."
        ) from error


@lru_cache(maxsize=4)
def _made_by_timm(name: str, arguments: str) -> Any:
    import timm  # A second that other files are spared.

    if not timm.is_model(name):
        return None
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return timm.create_model(name, **parse_json(arguments))


def _own(folder: Path, found: dict[str, Any], where: str) -> Architecture:
    values = found.get("architecture", {})
    try:
        stated = Architecture(
            **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
        )
        # An older release may have written fewer fields.
        if not isinstance(stated.family, str | None):
            raise TypeError(f"{stated.family!r} for a family")
        if stated.family and set_fields(stated).keys() >= set(field_names(stated.family)):
            whole(set_fields(stated))
        return stated
    except (TypeError, ConfigError) as error:
        raise WeightsError(
            f"{where}: {folder / 'config.json'}: fields of no architecture; got {error}, "
            "expected what fd_large wrote. Use the release that wrote it."
        ) from error


def _json(path: Path, where: str) -> dict[str, Any]:
    if kind_of(path) != "file":
        return {}
    found = read_json(path, where=where)
    if too_deep := _deeper(found):
        raise WeightsError(
            f"{where}: {path}: more blocks than a model has; got {too_deep}, expected at most "
            f"{MOST_BLOCKS}. Fetch the file again."
        )
    found = found if isinstance(found, dict) else {}
    # The backbone's, where the file is a whole segmentation model of transformers.
    inner = found.get("backbone_config") if found.get("model_type") == "upernet" else None
    return found if OWN in found or not isinstance(inner, dict) else inner


def _deeper(config: Any) -> str:
    """A number of layers, under whatever name, that no model has; "" if there is none."""
    for name, value in config.items() if isinstance(config, dict) else ():
        several = value if isinstance(value, list) else [value]
        number = sum(abs(v) for v in several if isinstance(v, int))
        if number > MOST_BLOCKS and any(word in name for word in ("layer", "depth", "block")):
            return f"{name} {number:,}"[:100]
        if inside := _deeper(value):
            return inside
    return ""


def _statistics(config: dict[str, Any], mean: str = "mean", std: str = "std") -> Statistics | None:
    if mean not in config or std not in config:
        return None
    means, deviations = tuple(config[mean]), tuple(config[std])
    numbers = len(means) == len(deviations) == 3 and math.isfinite(sum(means + deviations))
    if not numbers or min(deviations) <= 0:
        raise ValueError(f"statistics {str((means, deviations))[:100]}")
    return Statistics(means, deviations)
