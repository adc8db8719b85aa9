"""Weights for a net of timm: in timm's names, or in another port's, tensor by tensor in its order.

Running statistics of batch normalisation come along: buffers, but weights like any other.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from fd_large.errors import WeightsError
from fd_large.models.timm_backbone import TimmBackbone, create
from fd_large.weights.coverage import check_finite
from fd_large.weights.read import read


def read_timm(
    source: str | Path, name: str, *, stride: int, where: str = "weights"
) -> Iterator[tuple[str, Tensor]]:
    """Opens a file and yields the (name, tensor) of a `TimmBackbone`.

    What belongs to the whole net but not to the part up to the stride is left out.

    Args:
        source: A file, or `package:NAME`.
        name: timm's name of the net.
        stride: Pixels per token of the map.
        where: What the user set, for messages.

    Raises: WeightsError: if the file cannot be read, or is not of that net.
    """
    with torch.device("meta"):
        whole = create(name)
    items = in_timm_names(read(source, where=where), _state(whole), where=f"{where}: {name}")
    return _kept(items, name, stride, source, where)


def read_pretrained(
    source: str, name: str, *, stride: int, where: str = "weights"
) -> Iterator[tuple[str, Tensor]]:
    """Yields the (name, tensor) of a `TimmBackbone` with the weights that timm has for it.

    They come from timm's cache or the network, once the first is asked for.

    Args:
        source: What the user set, for messages.
        name: timm's name of the net.
        stride: Pixels per token of the map.
        where: What the user set, for messages.

    Raises: WeightsError: if timm has no weights for the net, or they cannot be had.
    """
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if config is not None and not config.has_weights:
        raise WeightsError(
            f"{where}: timm has no weights for this net; got {source}, expected one of "
            "timm.list_models(pretrained=True). Give the path of a file, and --teacher.model timm "
            f"--teacher.architecture.timm_name {name}."
        )
    return _pretrained(source, name, stride, where)


def _pretrained(source: str, name: str, stride: int, where: str) -> Iterator[tuple[str, Tensor]]:
    try:
        net = timm.create_model(name, pretrained=True)
    except (OSError, RuntimeError, ValueError) as error:
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise WeightsError(
            f"{where}: timm cannot get the weights; got {first_line} for {source}, expected them "
            "in its cache or within reach. Fetch the file elsewhere, and give its path, and "
            f"--teacher.model timm --teacher.architecture.timm_name {name}."
        ) from error
    yield from _kept(_state(net), name, stride, source, where)


def strides(name: str) -> list[int]:
    """Returns the strides at which a net of timm has maps, rising.

    Raises: ConfigError: if timm has no such net.
    """
    with torch.device("meta"):
        return sorted({stage["reduction"] for stage in create(name).feature_info})


def _kept(
    items: Mapping[str, Tensor], name: str, stride: int, source: str | Path, where: str
) -> Iterator[tuple[str, Tensor]]:
    """The tensors of the part up to the stride, looked at one by one."""
    with torch.device("meta"):
        kept = TimmBackbone(name, stride=stride)
    for key in _state(kept):
        key = key.removeprefix("net.")
        if key in items:
            check_finite(key, items[key], str(source), where)
            yield f"net.{key}", items[key]


def in_timm_names(
    tensors: Mapping[str, Tensor], expected: Mapping[str, Tensor], *, where: str = "weights"
) -> dict[str, Tensor]:
    """Returns the tensors under timm's names.

    A port of the same net into other names is told from this: as many tensors, in the same order,
    all of the same shapes, and not one name in common. Counters of batches are left out.

    Args:
        tensors: A file's.
        expected: timm's names and shapes, of the whole net, in order.
        where: What the user set, for the message.

    Raises: WeightsError: if the names differ and the tensors do not correspond one by one.
    """
    given = {key: t for key, t in tensors.items() if not key.endswith(_COUNTER)}
    if not given.keys().isdisjoint(expected):
        # By name; what is missing or left over, the net tells when it takes them.
        return given
    pairs = list(zip(expected.items(), given.items(), strict=False))
    misfit = next(
        (
            f"{theirs} {tuple(tensor.shape)} for {ours} {tuple(like.shape)}"
            for (ours, like), (theirs, tensor) in pairs
            if tensor.shape != like.shape
        ),
        "",
    )
    if len(given) != len(expected) or misfit:
        raise WeightsError(
            f"{where}: neither timm's names nor its tensors in its order; got {len(given)} tensors"
            f"{', ' + misfit if misfit else ''}, expected {len(expected)}. Name the net that the "
            "file holds: --teacher.architecture.timm_name."
        )
    return {ours: tensor for (ours, _), (_, tensor) in pairs}


_COUNTER = "num_batches_tracked"


def _state(net: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in net.state_dict().items() if not name.endswith(_COUNTER)}
