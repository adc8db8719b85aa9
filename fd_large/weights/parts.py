"""One model of a file that holds several: a student, its teacher, a backbone below its heads."""

from __future__ import annotations

import logging
import re

from fd_large.errors import WeightsError
from fd_large.weights.read import Tensors

log = logging.getLogger(__name__)

_TEACHER = "feature_model."
# What stands between a backbone and its heads, under the backbone's name.
_BETWEEN = re.compile(r"backbone\.(norm\d|hidden_states_norms|fpn\d|fpn)\.")


def tell_part(file: Tensors, name: str, taken: str, where: str) -> None:
    """Says in the log which of two models of a file is taken.

    Args:
        file: The tensors of the model that is taken.
        name: The file.
        taken: Name of the part.
        where: What the user set, for messages.
    """
    log.info(
        "%s: %s holds a student and a teacher: the %s is taken; %s#%s is the other",
        where,
        name,
        taken,
        name,
        file.other_part,
    )


def part_of(file: Tensors, part: str, name: str, where: str) -> tuple[Tensors, list[str]]:
    """Returns one model of a file of Feature-Distillation, and the names of all other tensors.

    Args:
        file: The file's tensors.
        part: Name of the model, as after # in a source; empty: the student.
        name: The file.
        where: What the user set, for messages.

    Raises: WeightsError: if the file holds no such part.
    """
    taught = {n.removeprefix(_TEACHER): n for n in file if n.startswith(_TEACHER)}
    has_projector = "decoder.0.weight" in file
    if part == "teacher" and taught:
        return file.under(taught), [n for n in file if n not in set(taught.values())]
    found = part in ("", "student") or part in file.wrapping
    if not found and not (part == "projector" and has_projector):
        raise WeightsError(
            f"{where}: {name}: no such part in the file; got #{part}, expected the file alone"
            f"{', #teacher' if taught else ''}{', #projector' if has_projector else ''}. Leave "
            "the part out."
        )
    rest = {n: n for n in file if not n.startswith(_TEACHER)}
    return file.under(rest), list(taught.values())


def backbone_of(file: Tensors) -> tuple[Tensors, list[str]]:
    """Returns the backbone of a whole segmentation model, and the names of all other tensors.

    Any other file is returned as it is.
    """
    if not any(name.startswith("decode_head.") for name in file):
        return file, []
    own = {
        name.removeprefix("backbone."): name
        for name in file
        if name.startswith("backbone.") and not _BETWEEN.match(name)
    }
    taken = set(own.values())
    return file.under(own), [name for name in file if name not in taken]
