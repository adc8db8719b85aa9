"""The published formats of all families: how a file is recognised by its names."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from fd_large.backbones.family import Family
from fd_large.backbones.published import Format
from fd_large.backbones.registry import FAMILIES
from fd_large.errors import WeightsError


class Known(NamedTuple):
    """A format, and the family whose models it holds."""

    family: Family
    format: Format


# No file is of the formats of two families.
FORMATS: dict[str, Known] = {
    name: Known(family, form)
    for family in FAMILIES.values()
    if family.published
    for name, form in family.published.formats.items()
}


def detect(names: Iterable[str], *, where: str = "weights", wrapping: tuple[str, ...] = ()) -> str:
    """Returns the format's name.

    Args:
        names: Names of a file's tensors.
        where: What the user set, for messages.
        wrapping: Keys that the tensors stood under, outermost first.

    Raises: WeightsError: if the names are of no known format, or of one that no model here takes.
    """
    names = frozenset(names)
    for name, (_, form) in FORMATS.items():
        if form.is_it(names, wrapping):
            if form.refusal:
                taken = ", ".join(name for name, (_, form) in FORMATS.items() if not form.refusal)
                raise WeightsError(
                    f"{where}: weights that no model here can take; got {form.what}, expected one "
                    f"of {taken}: {form.refusal}"
                )
            return name
    known = "; ".join(form.what for _, form in FORMATS.values() if not form.refusal)
    section, _, flag = where.removeprefix("--").rpartition(".")
    if where.startswith("--") and section:
        own = f"--{section}.{'model' if flag == 'init' else flag}"
        remedy = (
            f"If timm has the model, name it beside the file: --{section}.model timm:NAME. Another "
            f"model can be a function of your own: {own} module:PATH/TO/FILE.py:NAME."
        )
    else:
        remedy = "Name such a file, or a folder that the export of a run has written."
    raise WeightsError(
        f"{where}: names of no known format; got {', '.join(sorted(names)[:5])}, ..., expected one "
        f"of: {known}. {remedy}"
    )
