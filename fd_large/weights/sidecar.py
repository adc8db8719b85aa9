"""Reads the configuration file next to weights: transformers', timm's, open_clip's or our own."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from functools import cached_property, lru_cache
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
from fd_large.recipes.architectures import Architecture, field_names, filled, set_fields, whole
from fd_large.recipes.family import MOST_BLOCKS, FamilyArchitecture
from fd_large.weights.download import Located
from fd_large.weights.read import read_json

# Our own exports write their architecture under this key.
OWN = "fd_large"


class Stated(NamedTuple):
    """What a configuration states about a model.

    Attributes:
        architecture: The stated fields of the architecture; other fields are None.
        statistics: The stated image statistics; None if the configuration states none.
        own: Whether an export of this project wrote the configuration.
        code_hash: SHA-256 of the user's code file that makes the model; "" for other models.
    """

    architecture: Architecture
    statistics: Statistics | None
    own: bool = False
    code_hash: str = ""


class Described(NamedTuple):
    """A model that a library's configuration describes and that the library's module computes.

    Attributes:
        architecture: The architecture fields that the configuration states.
        statistics: The stated image statistics; None if the configuration states none.
        family: The family that builds the model.
        read_here: Whether a model of this package can also read the tensors. It has a final norm of
            the tokens, which the library's module may lack.
    """

    architecture: Architecture
    statistics: Statistics | None
    family: Family
    read_here: bool = False


class Configuration:
    """The configuration file next to weights: our own, timm's, transformers', open_clip's, or none.

    Every property raises WeightsError if the file is damaged or describes an unsupported model.

    Args:
        located: The location of the weights. It also has what a library states about them, if they
            are in the library's own list.
        folder: The folder of the weights.
    """

    def __init__(self, located: Located, folder: Path, where: str) -> None:
        self._located, self._folder, self._where = located, folder, where

    @cached_property
    def own(self) -> Stated | None:
        """What the config.json of our own export states; None for other folders."""
        record = self._config.get(OWN)
        if not record:
            return None
        with _plain_errors(self._folder, self._where):
            values = record.get("architecture", {})
            try:
                architecture = Architecture(
                    **{k: tuple(v) if isinstance(v, list) else v for k, v in values.items()}
                )
                if not isinstance(architecture.family, str | None):
                    raise TypeError(f"{architecture.family!r} for a family")
                fields = set_fields(architecture)
                # An older release may have written fewer fields.
                if architecture.family and fields.keys() >= set(field_names(architecture.family)):
                    whole(fields)
            except (TypeError, ConfigError) as error:
                raise WeightsError(
                    f"{self._where}: {self._folder / 'config.json'}: not the fields of an "
                    f"architecture; got {error}, expected the fields that fd_large wrote. Use the "
                    "release that wrote it."
                ) from error
            code_hash = record.get("code_sha256", "")
            return Stated(architecture, _statistics(record), own=True, code_hash=code_hash)

    @cached_property
    def model(self) -> Described | None:
        """The model of a library that config.json describes.

        The value is None if there is no such file, or if a model of this package reads the weights
        by the names of their tensors.
        """
        config, where = self._config, self._where
        if OWN in config or not self._library:
            return None
        with _plain_errors(self._folder, where):
            read_here = self._reader is not None
            # transformers' wrapper adds its own prefix to the names of timm's tensors.
            is_wrapped = config.get("model_type") == "timm_wrapper"
            if read_here and not is_wrapped and not self._lacks_norm:
                return None
            for family in FAMILIES.values():
                architecture = family.of_config and family.of_config(config, where)
                if architecture is not None:
                    return Described(architecture, self._statistics(), family, read_here)
        raise WeightsError(
            f"{where}: {self._folder / 'config.json'}: an unsupported model; got "
            f"{self._called}, expected a model that docs/weights.md lists. If timm has this "
            "model, name timm:NAME in place of these weights."
        )

    def stated(self, published: Published, library: str) -> Stated:
        """Returns what the configuration file states about weights in a published format.

        If a library lists the weights itself, what its list states takes precedence.

        Args:
            published: The family's description of its published files.
            library: Library whose configuration belongs to the format, or "".

        Raises: WeightsError: if the configuration is damaged, or describes a model of another
            family.
        """
        listed = _stated(published, self._located.library, self._located.config, self._where)
        with _plain_errors(self._folder, self._where):
            beside = self._beside(published, library)
        return beside._replace(
            architecture=filled(listed or Architecture(), beside.architecture),
            statistics=self._located.statistics or beside.statistics,
        )

    def _beside(self, published: Published, library: str) -> Stated:
        if self.own:
            return self.own
        config, where = self._config, self._where
        if self._library == "timm" or (self._library and self._library == library):
            if self._reader is None or self._reader.published is not published:
                raise WeightsError(
                    f"{where}: {self._folder / 'config.json'}: describes another model than the "
                    f"tensors beside this file; got {self._called}, expected the model of the "
                    "tensors. --teacher.model auto takes the model of the folder as a teacher; "
                    "--student.model timm:NAME makes a student of timm. If config.json does not "
                    "belong there, move it away."
                )
            stated = _stated(published, self._library, config, where) or Architecture()
            return Stated(stated, self._statistics())
        if library == "open_clip":
            config = self._read("open_clip_config.json")
            if "model_cfg" in config:
                stated = _stated(published, library, config["model_cfg"], where) or Architecture()
                return Stated(stated, _statistics(config.get("preprocess_cfg", {})))
        return Stated(Architecture(), None)

    @cached_property
    def _config(self) -> dict[str, Any]:
        return self._read("config.json")

    @property
    def _library(self) -> str:
        """The library whose format config.json has: "timm", "hf", or "" for none or no file."""
        if isinstance(self._config.get("architecture"), str):
            return "timm"
        return "hf" if isinstance(self._config.get("model_type"), str) else ""

    @property
    def _called(self) -> str:
        if self._library == "timm":
            return f"timm's {self._config['architecture'][:100]!r}"
        return f"transformers' {self._config['model_type'][:100]!r}"

    @cached_property
    def _reader(self) -> Family | None:
        """The family whose published formats include config.json's model; None if there is none."""
        read_by = (
            family
            for family in FAMILIES.values()
            if family.published
            and _stated(family.published, self._library, self._config, self._where)
        )
        return next(read_by, None)

    @property
    def _lacks_norm(self) -> bool:
        """Whether config.json describes a timm model without a final norm of its tokens.

        Most of these models instead have a norm of the tokens' mean, before the head (`fc_norm`).
        """
        if self._library != "timm":
            return False
        module = _timm_module(self._config, self._where)
        return isinstance(getattr(module, "norm", None), nn.Identity)

    def _statistics(self) -> Statistics | None:
        if self._library == "timm":
            # Folders of old releases of timm have these fields at the top level.
            return _statistics(self._config.get("pretrained_cfg", self._config))
        preprocessing = self._read("preprocessor_config.json")
        return _statistics(preprocessing, "image_mean", "image_std")

    def _read(self, name: str) -> dict[str, Any]:
        path = self._folder / name
        # A model that a library provides has no folder.
        if self._located.tensors is not None or kind_of(path) != "file":
            return {}
        config = read_json(path, where=self._where)
        if too_deep := _deeper(config):
            raise WeightsError(
                f"{self._where}: {path}: more blocks than a model can have; got {too_deep}, "
                f"expected at most {MOST_BLOCKS}. Fetch the file again."
            )
        config = config if isinstance(config, dict) else {}
        # For a whole segmentation model of transformers, the configuration of its backbone.
        inner = config.get("backbone_config") if config.get("model_type") == "upernet" else None
        return config if OWN in config or not isinstance(inner, dict) else inner


@contextmanager
def _plain_errors(folder: Path, where: str) -> Iterator[None]:
    """Turns errors in the block, caused by a damaged configuration, into a WeightsError."""
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
            f"{where}: the configuration in {folder}: not valid for its format; got "
            f"{type(error).__name__} {error}, expected the file as it was published. Fetch the "
            "file again, or move it away and set the fields of the architecture that are then "
            "unknown."
        ) from error


def _stated(published: Published, library: str, config: Any, where: str) -> Architecture | None:
    """Returns the architecture fields that a library's configuration states.

    Returns None if the configuration describes a model of another family than `published`.

    Args:
        library: "timm", "hf", "open_clip", or "" for none.
        config: The configuration: contents of config.json, for "timm" also a module, for
            "open_clip" a model configuration.

    Raises: WeightsError: for an unsupported activation, or if timm cannot make the model.
    """
    if library == "open_clip" and "timm_model_name" in config.get("vision_cfg", {}):
        vision = config["vision_cfg"]
        named = {"architecture": vision["timm_model_name"]}
        stated = _stated(published, "timm", named, where) or Architecture()
        return replace(stated, image_size=vision.get("image_size") or stated.image_size)
    reader = published.configs.get(library)
    if library == "timm" and isinstance(config, dict):
        config = _timm_module(config, where)
    return None if reader is None or config is None else reader(config, where)


def own_config(
    architecture: FamilyArchitecture,
    statistics: Statistics | None,
    *,
    code_hash: str = "",
    trained_by: Sequence[Mapping[str, Any]] = (),
) -> dict[str, dict[str, Any]]:
    """Returns the entry of this package in the config.json of an export, {"fd_large": record}.

    Args:
        architecture: The model.
        statistics: Image statistics that the weights were trained with; None if unknown.
        code_hash: SHA-256 of the user's code file that makes the model, or "".
        trained_by: Records of the training runs that led to the weights, the latest first.
    """
    record: dict[str, Any] = {"architecture": architecture.values()}
    if statistics is not None:
        record |= {"mean": list(statistics.mean), "std": list(statistics.std)}
    if code_hash:
        record["code_sha256"] = code_hash
    if trained_by:
        record["trained_by"] = list(trained_by)
    return {OWN: record}


def _timm_module(config: dict[str, Any], where: str) -> Any:
    """Returns the module that timm's config.json describes, on the meta device.

    Returns None if timm has no model of that name.

    Raises: WeightsError: for arguments that no published folder has, or that timm refuses.
    """
    arguments = config.get("model_args") or {}
    if unknown := strange_arguments(arguments):
        raise WeightsError(
            f"{where}: config.json: model_args that are not passed to timm; got "
            f"{', '.join(unknown)[:200]}, expected only {', '.join(sorted(ARGUMENTS))}, each a "
            "text, list or number of the size that models have. Remove the argument, or name "
            "timm:NAME in place of these weights."
        )
    text = json.dumps(arguments, sort_keys=True)
    try:
        return _made_by_timm(config["architecture"], text)
    except (ArithmeticError, AssertionError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{where}: config.json: timm cannot make this model; got {first_line(error)} for "
            f"timm's {config['architecture'][:100]!r} with {text[:200]}, expected a folder as "
            "timm writes it. Fetch the folder again."
        ) from error


@lru_cache(maxsize=4)
def _made_by_timm(name: str, arguments: str) -> Any:
    import timm  # Takes a second, which other files do not need.

    if not timm.is_model(name):
        return None
    with torch.device("meta"), torch.random.fork_rng(devices=[]):
        return timm.create_model(name, **parse_json(arguments))


def _deeper(config: Any) -> str:
    """Returns the first entry of `config` with an impossible number of layers, as "depth 5,000".

    Entries of nested dicts are searched too. The result is "" if there is no such entry.
    """
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
