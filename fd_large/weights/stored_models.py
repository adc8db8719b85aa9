"""Models that this project stored: in a run, in a checkpoint, or in the folder of an export."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from fd_large import doors
from fd_large.backbones.registry import statistics_of
from fd_large.backbones.statistics import Statistics
from fd_large.errors import WeightsError
from fd_large.recipes.architectures import name_of, set_fields, whole
from fd_large.recipes.family import FamilyArchitecture
from fd_large.weights.read import Tensors, read
from fd_large.weights.sidecar import read_own

log = logging.getLogger(__name__)


class Stored(NamedTuple):
    """A model of this project's that no weights file holds.

    Attributes:
        path: Path by which it is opened again, whatever is stored since.
        file: Its tensors in our names.
        architecture: The model.
        statistics: Mean and deviation by which its images are normalised.
        sizes: Number of elements of each tensor, by the name that it is stored under.
    """

    path: Path
    file: Tensors
    architecture: FamilyArchitecture
    statistics: Statistics
    sizes: Mapping[str, int]


StoredReader = Callable[[Path, str], Stored | None]
"""(path, what the user set) -> the model, or None where the path means nothing to it."""


def exported(path: Path, where: str) -> Stored | None:
    """Opens a folder that `export` wrote, of a model whose file does not show it.

    Args:
        path: The folder.
        where: What the user set, for messages.

    Returns: None if it is no such folder.
    """
    found = read_own(path, where)
    if found is None or not found.architecture.family:
        return None
    architecture = whole(set_fields(found.architecture))
    code_hash = doors.hashes(architecture.code).get(architecture.code, "")
    if code_hash and code_hash != found.code_hash:
        log.warning(
            "%s: %s is NOT THE FILE that made this model (its hash was %s, now %s)",
            path,
            architecture.code,
            found.code_hash[:12],
            code_hash[:12],
        )
    statistics = found.statistics or statistics_of("", architecture)
    file = read(str(path), where=where)
    return Stored(path, file, architecture, statistics, {n: math.prod(file.shape(n)) for n in file})


def other_model(
    source: str, held: FamilyArchitecture, wanted: FamilyArchitecture, where: str
) -> WeightsError:
    """Returns the refusal of what this project stored, where it is not the model that is wanted."""
    return WeightsError(
        f"{where}: {source}: another model; it holds {name_of(held)}, expected {name_of(wanted)}. "
        f"{remedy_for(held)}"
    )


def remedy_for(held: FamilyArchitecture) -> str:
    """Returns what to do about weights that hold another model than the one that is wanted."""
    return f"Set --student.model {name_of(held)}, which it holds."
