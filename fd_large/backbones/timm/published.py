"""Reads weights for a timm model, by timm's names or, with other names, by the tensors' order.

Running statistics of batch norms are read as well: they count as weights, although buffers.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
from timm.models import save_for_hf
from torch import Tensor, nn

from fd_large.backbones.download import download, downloaded
from fd_large.backbones.family import Loaded, Options
from fd_large.backbones.published import Matched, WeightFacts
from fd_large.backbones.statistics import Statistics
from fd_large.backbones.timm.architecture import (
    TimmArchitecture,
    split_arguments,
    with_arguments,
)
from fd_large.backbones.timm.models import (
    can_resize,
    config_of,
    create,
    last_map,
    near_names,
    size_arguments,
    sized,
    strides,
)
from fd_large.backbones.timm.timm_backbone import build
from fd_large.backbones.translation import RECOMPUTED, Piece, Shape, Shapes
from fd_large.errors import WeightsError, first_line
from fd_large.recipes.architectures import Architecture

# What open_clip's files hold beside an image tower that is timm's.
_BESIDE_TRUNK = (
    *("visual.head.", "text.", "text_projection", "transformer.", "token_embedding."),
    *("positional_embedding", "ln_final.", "logit_scale", "logit_bias"),
)
_NOT_WEIGHTS = ("num_batches_tracked", *RECOMPUTED)


def matched(architecture: TimmArchitecture, file: Shapes, where: str) -> Matched:
    """Matches the tensors of a `TimmBackbone` with those of a file.

    Tensors of modules after the map are left out. Positions for another image size are resized by
    timm's own rule.

    Args:
        architecture: The model.
        file: {name: shape} of the file's tensors.
        where: Field that the user set, for messages.

    Raises: WeightsError: if the file's tensors match the model's neither by name nor by order.
    """
    name = architecture.timm_name
    whole = _shapes(_weightless(name))
    with torch.device("meta"):
        state = _state(build(architecture, Options()))
    expected = _shapes(state)
    names = _without_prefix([key for key in file if not key.endswith(_NOT_WEIGHTS)])
    names = {key: source for key, source in names.items() if key not in _second_names(name)}
    shapes = {key: file[source] for key, source in names.items()}
    theirs = in_timm_names(shapes, whole, where=f"{where}: {name}")
    theirs = {key: names[source] for key, source in theirs.items()}
    after = [key for key in theirs if key in whole and f"net.{key}" not in expected]
    pieces = {f"net.{key}": Piece((source,)) for key, source in theirs.items() if key not in after}
    notes = [f"left out on purpose: {len(after)} tensors that come after the map"] if after else []
    if size_arguments(name, architecture.image_size) and can_resize(name):
        other = [
            key
            for key, piece in pieces.items()
            if piece.shape(file.__getitem__) != expected.get(key, file[piece.sources[0]])
        ]
        resize = _Resize(architecture, theirs)
        for key in other:
            sources = pieces[key].sources
            pieces[key] = _Resized(sources, name=key, new_shape=expected[key], resize=resize)
        if other:
            notes.append(
                f"resized by timm for {architecture.image_size} pixels: {len(other)} tensors"
            )
    return Matched(
        pieces,
        expected,
        notes,
        f"timm's {name}",
        "Name the model that the file holds: --student.model timm:NAME, or for a teacher "
        "--teacher.model timm:NAME.",
    )


@dataclass(frozen=True)
class _Resized(Piece):
    """Rule that makes a tensor of positions by timm's resizing to another image size.

    Attributes:
        name: Name of the tensor in our model.
        new_shape: Shape of the tensor in our model.
        resize: Returns {our name: tensor} of all weights at the model's image size, given the
            weights of the file.
    """

    name: str = ""
    new_shape: Shape = ()
    resize: Callable[[Mapping[str, Tensor]], Mapping[str, Tensor]] = dict

    def shape(self, shape_of: Callable[[str], Shape]) -> Shape:
        """Returns the shape of the positions at the model's image size; `shape_of` is not used."""
        return self.new_shape

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """Returns the positions at the model's image size.

        Args:
            tensors: The tensors of the file, by their names in the file.
        """
        return self.resize(tensors)[self.name]


class _Resize:
    """Resizes all weights of a file to a model's image size, by timm's code in CPU memory.

    The first call does the work, and later calls return its result.

    Args:
        architecture: The model.
        names: {timm's name: name in the file} of each tensor.
    """

    def __init__(self, architecture: TimmArchitecture, names: Mapping[str, str]) -> None:
        self._architecture, self._names = architecture, names
        self._resized: dict[str, Tensor] | None = None

    def __call__(self, file: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Returns {our name: tensor} of all weights, resized to the model's image size.

        Args:
            file: The tensors of the file, by their names in the file.
        """
        if self._resized is None:
            name, size = self._architecture.timm_name, self._architecture.image_size
            state = {ours: file[theirs].float() for ours, theirs in self._names.items()}
            with torch.random.fork_rng(devices=[]):
                timm_name, arguments = split_arguments(name)
                net = timm.create_model(
                    timm_name,
                    pretrained=True,
                    pretrained_cfg_overlay={"state_dict": state},
                    pretrained_strict=False,
                    num_classes=0,
                    **arguments,
                    **size_arguments(name, size),
                )
            self._resized = {f"net.{key}": tensor for key, tensor in net.state_dict().items()}
        return self._resized


def weightless(name: str, where: str) -> dict[str, Tensor]:
    """Returns {timm's name: weight on the meta device} of the whole model `name`.

    Raises:
        WeightsError: If timm has the model, but no weights for it. The message begins with `where`.
    """
    _refuse_untrained(name, where)
    return _weightless(name)


def settle(name: str, architecture: Architecture, where: str) -> tuple[Architecture, list[str]]:
    """Returns (architecture with a stride, notes for the log) of a source `timm:NAME`.

    If the user gave no stride, the stride is that of the model's last map.

    Args:
        name: NAME of the source.
        architecture: The fields that the user set.
        where: Not used.

    Raises:
        ConfigError: If timm lacks the model, or the model returns no map.
        ShapeError: If the model does not accept the image size.
    """
    stride, notes = architecture.feature_stride, []
    known = strides(name)
    if stride is None:
        stride = known[-1]
        notes.append(f"timm:{name}: its last map, as forward_features returns it")
    if stride in (0, known[-1]):
        last_map(name, architecture.image_size or 0)
    return Architecture(
        timm_name=name, feature_stride=stride, image_size=architecture.image_size
    ), notes


# Arguments of a model that change neither its map nor the names of its tensors.
_HARMLESS = ("drop_path_rate", "drop_rate", "num_classes", "strict_img_size")


def of_config(config: Mapping[str, Any], where: str) -> Architecture | None:
    """Returns the architecture that `config`, the contents of a folder's config.json, describes.

    Returns None if the file is not timm's.

    Raises:
        WeightsError: If this release of timm lacks the model, or the images are not square. The
            message begins with `where`.
        ConfigError: If timm refuses the arguments of the model.
    """
    name, arguments = config.get("architecture"), dict(config.get("model_args") or {})
    if not isinstance(name, str):
        return None
    if not timm.is_model(name):
        raise WeightsError(
            f"{where}: config.json: no such model in timm {timm.__version__}; got {name[:100]!r}, "
            f"{near_names(name)}. Install the release of timm that has it."
        )
    size = arguments.pop("img_size", 0)
    sides = set(size if isinstance(size, list) else [size])
    if arguments.get("in_chans") == 3:
        arguments.pop("in_chans")
    for harmless in _HARMLESS:
        arguments.pop(harmless, None)
    pool = arguments.pop("global_pool", None)
    # A pooling of its own may move the final norm from the tokens to their mean.
    pooled = arguments if pool is None else {**arguments, "global_pool": pool}
    shapes = [_shapes(_weightless(with_arguments(name, a))) for a in (arguments, pooled)]
    name = with_arguments(name, pooled if shapes[0] != shapes[1] else arguments)
    if len(sides) != 1:
        raise WeightsError(
            f"{where}: config.json: images are not square; got img_size {size}, expected equal "
            "sides. Use another model."
        )
    return Architecture(timm_name=name, feature_stride=0, image_size=sides.pop())


def resizes(architecture: TimmArchitecture) -> bool:
    """Whether a model's weights can be used at other image sizes, unchanged or resized by timm."""
    name = architecture.timm_name
    return can_resize(name) or not sized(name, 0).is_only


def facts_of(architecture: TimmArchitecture) -> WeightFacts:
    """Returns the facts of timm's own weights for the timm model `architecture`."""
    config = config_of(architecture.timm_name)
    statistics = _statistics(architecture.timm_name)
    licence, origin = config.license or "", config.hf_hub_id or config.url or "timm"
    return WeightFacts(statistics, config.input_size[-1], licence, origin)


def _refuse_untrained(name: str, where: str) -> None:
    config = config_of(name) if timm.is_model(split_arguments(name)[0]) else None
    if config is not None and not config.has_weights:
        raise WeightsError(
            f"{where}: timm has no weights for this model; got timm:{name}, expected one of "
            "timm.list_models(pretrained=True). Give the path of a file, and --teacher.model "
            f"timm:{name}."
        )


def load(name: str, where: str) -> Loaded:
    """Returns the whole model `name` with timm's weights, from timm's cache or the network.

    Raises:
        WeightsError: If timm has no weights for the model, lacks the model, or cannot download the
            weights; the message begins with `where`.
    """
    _refuse_untrained(name, where)
    return downloaded(_source(name), partial(_load, name, where))


def fetch(name: str, where: str) -> None:
    """Downloads timm's weights of the model `name` into timm's cache, for a later `load`.

    In a meeting of all ranks (`ranks.meeting`), one rank downloads for all ranks that share its
    cache.

    Raises:
        WeightsError: If timm has no weights for the model, lacks the model, or cannot download the
            weights; the message begins with `where`.
    """
    _refuse_untrained(name, where)
    download(_source(name), partial(_load, name, where))


def save(name: str, where: str, folder: Path) -> str:
    """Writes the whole model `name` with timm's weights to `folder`, in timm's format.

    Returns: the licence of the weights, or "" if timm states none.
    Raises:
        WeightsError: If timm has no weights for the model, lacks the model, or cannot download the
            weights; the message begins with `where`.
    """
    net = load(name, where).net
    save_for_hf(net, str(folder), safe_serialization=True)
    return net.pretrained_cfg.get("license") or ""


def _source(name: str) -> str:
    return f"{TimmArchitecture.prefix}{name}"


def _load(name: str, where: str) -> Loaded:
    try:
        timm_name, arguments = split_arguments(name)
        net = timm.create_model(timm_name, pretrained=True, **arguments)
        return Loaded(net, _statistics(name))
    except (OSError, RuntimeError, ValueError) as error:
        raise WeightsError(
            f"{where}: timm cannot get the weights; got {first_line(error)} for timm:{name}, "
            "expected weights that are cached or can be reached. Download the file elsewhere, and "
            f"give its path and --teacher.model timm:{name}."
        ) from error


def in_timm_names(shapes: Shapes, expected: Shapes, *, where: str = "weights") -> dict[str, str]:
    """Returns {timm's name: the file's name} of the tensors in a file.

    If no name in the file is a name in timm, the file is taken for a port of the model to other
    names, whose tensors have to be equal in number, order and shape.

    Args:
        shapes: Names and shapes of a file's tensors, in order.
        expected: timm's names and shapes of the whole model's tensors, in order.
        where: Field that the user set, for the message.

    Raises: WeightsError: if a port's tensors differ in number, order or shape.
    """
    if not shapes.keys().isdisjoint(expected):
        return {_layer_scale(name, expected): name for name in shapes}
    pairs = list(zip(expected.items(), shapes.items(), strict=False))
    misfit = next(
        (
            f"{theirs} {shape} for {ours} {like}"
            for (ours, like), (theirs, shape) in pairs
            if shape != like
        ),
        "",
    )
    if len(shapes) != len(expected) or misfit:
        raise WeightsError(
            f"{where}: tensors match timm's model neither by name nor by order; got {len(shapes)} "
            f"tensors{', ' + misfit if misfit else ''}, expected {len(expected)}. Name the file's "
            "model: timm:NAME."
        )
    return {ours: theirs for (ours, _), (theirs, _) in pairs}


def _layer_scale(name: str, expected: Shapes) -> str:
    """Translates DeiT III's name of a layer scale to timm's.

    Args:
        name: Name of a tensor in the file. It is returned unchanged if timm's model has a tensor of
            this name, or none of the translated name.
        expected: {timm's name: shape} of the tensors of timm's model.
    """
    theirs = re.sub(r"\.gamma_([12])$", r".ls\1.gamma", name)
    return theirs if name not in expected and theirs in expected else name


def _without_prefix(names: list[str]) -> dict[str, str]:
    """Removes a known prefix before timm's names; returns {name without prefix: name in the file}.

    Known prefixes are `net.` in our checkpoints, `encoder.` in our "fd" exports, `timm_model.` in
    transformers' files, and `visual.trunk.` in open_clip's files. Names of other tensors in a file
    with a known prefix are left out. A file without a known prefix keeps its names.

    Args:
        names: Names of all tensors in the file.
    """
    for prefix, beside in (
        ("net.", ()),
        ("encoder.", ("decoder.",)),
        ("timm_model.", ()),
        ("visual.trunk.", _BESIDE_TRUNK),
    ):
        ours = [name for name in names if name.startswith(prefix)]
        if ours and all(name.startswith((prefix, *beside)) for name in names):
            return {name.removeprefix(prefix): name for name in ours}
    return {name: name for name in names}


def _weightless(name: str) -> dict[str, Tensor]:
    with torch.device("meta"):
        return _state(create(name))


@lru_cache(maxsize=64)
def _second_names(name: str) -> frozenset[str]:
    """Returns the duplicate names in the state dict of timm's model `name`.

    These are, for each tensor with several names, all but the first.
    """
    with torch.device("meta"):
        net = create(name)
    first = {name for name, _ in (*net.named_parameters(), *net.named_buffers())}
    return frozenset(name for name in net.state_dict() if name not in first)


def _statistics(name: str) -> Statistics:
    config = config_of(name)
    return Statistics(tuple(config.mean), tuple(config.std))


def _state(net: nn.Module) -> dict[str, Tensor]:
    """Returns {name: tensor} of the parameters and floating-point buffers of `net`.

    Each tensor is there once: a module shared by several blocks has several names in a state dict,
    of which the first is kept.
    """
    names = {name for name, _ in (*net.named_parameters(), *net.named_buffers())}
    state = net.state_dict().items()
    return {name: t for name, t in state if name in names and t.is_floating_point()}


def _shapes(tensors: Mapping[str, Tensor]) -> dict[str, Shape]:
    return {name: tuple(tensor.shape) for name, tensor in tensors.items()}
