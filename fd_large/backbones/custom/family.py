"""The `Family` of the user's own models."""

from __future__ import annotations

from dataclasses import replace

import torch

from fd_large import doors
from fd_large.backbones.custom.architecture import CustomArchitecture
from fd_large.backbones.custom.custom import build_custom
from fd_large.backbones.exports import Export
from fd_large.backbones.family import Family, Loaded, Options, Scheme
from fd_large.backbones.published import Matched
from fd_large.backbones.translation import FEATURE_DISTILLATION, Piece, Shapes
from fd_large.recipes.architectures import Architecture


def _settle(
    function: str, architecture: Architecture, where: str
) -> tuple[Architecture, list[str]]:
    # Where it fails, the message names what the user set.
    doors.load(CustomArchitecture(function=function).code, kind="backbones", where=where)
    return Architecture(family=CustomArchitecture.family, function=function), []


def _load(function: str, where: str) -> Loaded:
    net = build_custom(CustomArchitecture(function=function), Options(), where=where)
    return Loaded(net, getattr(net, "statistics", None))


def _matched(architecture: CustomArchitecture, file: Shapes, where: str) -> Matched:
    """Matches a model's tensors with a file's by name.

    A file exported in the format "fd" has the prefix `encoder.` before the names.

    Args:
        architecture: The model.
        file: {name: shape} of the file's tensors.
        where: Field that the user set, for messages.
    """
    with torch.device("meta"):
        net = build_custom(architecture, Options(), where=where)
    expected = {
        name: tuple(tensor.shape)
        for name, tensor in net.state_dict().items()
        if tensor.is_floating_point()
    }
    names = {name.removeprefix("encoder."): name for name in file}
    if names.keys() & expected.keys():  # An export holds the projection as well.
        names = {name: key for name, key in names.items() if not key.startswith("decoder.")}
    return Matched(
        {name: Piece((key,)) for name, key in names.items()},
        expected,
        [],
        architecture.code,
        f"Name the model that the file holds: --student.model {doors.PREFIX}PATH/TO/FILE.py:NAME.",
    )


def _without_folders(architecture: CustomArchitecture) -> CustomArchitecture:
    """Returns the architecture with the code's path shortened to the name of the file.

    Published files thus do not show the folders of the user's machine.
    """
    return replace(architecture, function=architecture.function.rpartition("/")[2])


CUSTOM = Family(
    architecture=CustomArchitecture,
    build=build_custom,
    matched=_matched,
    exports={
        "fd": Export(
            names=lambda a: f"Feature-Distillation's, around those of {_without_folders(a).code}",
            rows=lambda a: FEATURE_DISTILLATION,
            becomes=_without_folders,
        )
    },
    scheme=Scheme(settle=_settle, load=_load),
)
"""The `Family` of the user's own models; a source `module:...` brings a module with its weights."""
