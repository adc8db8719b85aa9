"""Weights for a model of timm: in timm's names, or in another port's, tensor by tensor in its order.

Running statistics of batch normalisation come along: buffers, but weights like any other.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from fd_large.backbones.timm.timm_backbone import TimmBackbone, create
from fd_large.errors import WeightsError
from fd_large.weights.coverage import Fitted
from fd_large.weights.read import Tensors, read
from fd_large.weights.swin import RECOMPUTED
from fd_large.weights.translation import Piece, Shape

TIMM = "timm:"
_COUNTER = "num_batches_tracked"


def fitted(
    source: str | Path,
    name: str,
    *,
    stride: int,
    allow: tuple[str, ...] = (),
    where: str = "weights",
) -> Fitted:
    """The tensors of a `TimmBackbone`, checked against its shapes.

    What belongs to the whole model but not to the part up to the stride is left out.

    Args:
        source: A file, `package:NAME`, or `timm:NAME` for the weights that timm has.
        name: timm's name of the model.
        stride: Pixels per token of the map.
        allow: Patterns of names that may be missing or left over.
        where: What the user set, for messages.

    Raises: WeightsError: if the file cannot be read or is not of that model, or timm has no weights
        for it.
    """
    with torch.device("meta"):
        whole = _state(create(name))
        kept = _state(TimmBackbone(name, stride=stride))
    if str(source).startswith(TIMM):
        file: Tensors = _Pretrained(str(source), name, whole, where)
    else:
        file = read(source, where=where)
    expected = {key: tuple(tensor.shape) for key, tensor in kept.items()}
    theirs = in_timm_names(
        {key: file.shape(key) for key in file if not key.endswith((_COUNTER, *RECOMPUTED))},
        {key: tuple(tensor.shape) for key, tensor in whole.items()},
        where=f"{where}: {name}",
    )
    after = [key for key in theirs if key in whole and f"net.{key}" not in expected]
    pieces = {f"net.{key}": Piece((held,)) for key, held in theirs.items() if key not in after}
    return Fitted(
        pieces,
        file,
        expected,
        allow=allow,
        what=f"{source} (timm's {name})",
        where=where,
        notes=[f"left out on purpose: {len(after)} tensors that come after the map"],
        remedy="Name the model that the file holds: --teacher.architecture.timm_name.",
        resize=False,
    )


def pretrained(source: str, name: str, *, where: str = "weights") -> nn.Module:
    """Returns a model with the weights that timm has for it, from its cache or the network.

    Args:
        source: What the user set, for messages.
        name: timm's name of the model.
        where: What the user set, for messages.

    Raises: WeightsError: if timm has no weights for the model, or they cannot be had; ConfigError:
        if there is no such model.
    """
    _refuse_untrained(source, name, where)
    try:
        return timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{where}: timm cannot get the weights; got {first_line} for {source}, expected them "
            "in its cache or within reach. Fetch the file elsewhere, and give its path, and "
            f"--teacher.model timm --teacher.architecture.timm_name {name}."
        ) from error


class _Pretrained(Tensors):
    """The tensors of a model with timm's weights, which come once the first is asked for."""

    def __init__(self, source: str, name: str, shapes: Mapping[str, Tensor], where: str):
        _refuse_untrained(source, name, where)
        super().__init__(shapes)
        self._asked, self._there = (source, name, where), False

    def __getitem__(self, name: str) -> Tensor:
        if not self._there:
            source, net, where = self._asked
            self._entries, self._there = _state(pretrained(source, net, where=where)), True
        return super().__getitem__(name)


def strides(name: str) -> list[int]:
    """Returns the strides at which a model of timm has maps, rising.

    Raises: ConfigError: if timm has no such model.
    """
    with torch.device("meta"):
        return sorted({stage["reduction"] for stage in create(name).feature_info})


def in_timm_names(
    given: Mapping[str, Shape], expected: Mapping[str, Shape], *, where: str = "weights"
) -> dict[str, str]:
    """Returns timm's name of each tensor of a file: {timm's: the file's}.

    A port of the same model into other names is told from this: as many tensors, in the same order,
    all of the same shapes, and not one name in common.

    Args:
        given: A file's names and shapes, in order.
        expected: timm's, of the whole model, in order.
        where: What the user set, for the message.

    Raises: WeightsError: if the names differ and the tensors do not correspond one by one.
    """
    if not given.keys().isdisjoint(expected):
        return {name: name for name in given}
    pairs = list(zip(expected.items(), given.items(), strict=False))
    misfit = next(
        (
            f"{theirs} {shape} for {ours} {like}"
            for (ours, like), (theirs, shape) in pairs
            if shape != like
        ),
        "",
    )
    if len(given) != len(expected) or misfit:
        raise WeightsError(
            f"{where}: neither timm's names nor its tensors in its order; got {len(given)} tensors"
            f"{', ' + misfit if misfit else ''}, expected {len(expected)}. Name the model that the "
            "file holds: --teacher.architecture.timm_name."
        )
    return {ours: theirs for (ours, _), (theirs, _) in pairs}


def _refuse_untrained(source: str, name: str, where: str) -> None:
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if config is not None and not config.has_weights:
        raise WeightsError(
            f"{where}: timm has no weights for this model; got {source}, expected one of "
            "timm.list_models(pretrained=True). Give the path of a file, and --teacher.model timm "
            f"--teacher.architecture.timm_name {name}."
        )


def _state(net: nn.Module) -> dict[str, Tensor]:
    """Parameters and running statistics; integer buffers are no weights."""
    return {name: t for name, t in net.state_dict().items() if t.is_floating_point()}
