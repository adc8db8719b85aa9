"""What a weights file is: format, architecture, parameters, and what would match a net."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fd_large.backbones.registry import parameter_shapes
from fd_large.backbones.statistics import Statistics
from fd_large.recipes.architectures import (
    ARCHITECTURES,
    Architecture,
    field_names,
    filled,
    resolve,
    set_fields,
    whole,
)
from fd_large.recipes.family import FamilyArchitecture
from fd_large.weights.coverage import Match, listed, match
from fd_large.weights.facts import FACTS, WeightFacts
from fd_large.weights.source import Weights, open_weights

# Published models whose files are of a format, by the start of their names in the table of nets.
_PUBLISHED = {
    "openai_clip": "clip_",
    "dino": "dino_",
    "deit": "deit_",
    "esvit": "swin_base_esvit",
    "swinv2": "swinv2_",
    "simmim_swinv2": "swinv2_1b",
}
# Fields that no shape depends on, so that a model can be compared without them.
_WITHOUT_SHAPE = {"norm_eps": 1e-6, "activation": "gelu", "keep_distillation_token": False}


@dataclass(frozen=True)
class Inspection:
    """What was found.

    Attributes:
        source: As the user gave it.
        form: The format's name in the table.
        what: The format in words.
        own: Whether this project wrote the file.
        architecture: As far as it is known; None in other fields.
        unknown: Fields that neither file nor configuration tells.
        statistics: That it was trained with; None: unknown.
        named: A model of the table with this architecture; "": none.
        facts: Licence and origin, where the published weights are known.
        parameters: Elements of the model in the file.
        dtypes: Types of its tensors.
        match: How it fits the model it shows, or the one asked for; None: too little is known.
        dropped: Names that are left out on purpose.
    """

    source: str
    form: str
    what: str
    own: bool
    architecture: Architecture
    unknown: tuple[str, ...]
    statistics: Statistics | None
    named: str
    facts: WeightFacts | None
    parameters: int
    dtypes: tuple[str, ...]
    match: Match | None
    dropped: tuple[str, ...]


def inspect(source: str | Path, *, model: str = "auto") -> Inspection:
    """Reads a file's headers and says what is in it.

    Args:
        source: A path, `hf:REPO`, `package:NAME` or `open_clip:ARCH/TAG`.
        model: A model of the table to compare with; "auto": the one that the file shows.

    Raises: WeightsError: if it cannot be read or is of no known format; ConfigError: for an
        unknown model.
    """
    weights = open_weights(source, where="weights")
    family = weights.format.family
    known = _merged(weights)
    unknown = tuple(sorted(name for name in field_names(family) if getattr(known, name) is None))
    net = _for_shapes(known) if model == "auto" else resolve(model)
    compared = None
    if net is not None:
        expected = parameter_shapes(net)
        pieces, _ = weights.adapted(net, expected)
        found = {name: piece.shape(weights.file.shape) for name, piece in pieces.items()}
        compared = match(found, expected)
    file_shapes = weights.shapes()
    named = _named(known, weights.form)
    sources = [name for piece in weights.pieces.values() for name in piece.sources]
    return Inspection(
        source=str(source),
        form=weights.form,
        what=weights.format.what,
        own=weights.own,
        architecture=known,
        unknown=tuple(name for name in unknown if name != "keep_distillation_token"),
        statistics=weights.statistics,
        named=named,
        facts=FACTS.get(named),
        parameters=sum(math.prod(shape) for shape in file_shapes.values()),
        dtypes=tuple(sorted({str(weights.file.dtype(n)).removeprefix("torch.") for n in sources})),
        match=compared,
        dropped=tuple(weights.dropped),
    )


def _merged(weights: Weights) -> Architecture:
    told = set_fields(weights.told)
    known = filled(weights.found, weights.told)
    return replace(known, **{k: told[k] for k in ("image_size", "window_size") if k in told})


def _for_shapes(known: Architecture) -> FamilyArchitecture | None:
    """The architecture with the fields filled that no shape depends on; None if others lack."""
    stages = len(known.depths or ())
    fill: dict[str, Any] = dict(_WITHOUT_SHAPE)
    if known.family == "vit":
        fill["num_heads"] = (1,)
    if known.family == "swinv2":
        fill |= {"window_size": 1, "pretrained_window_sizes": (0,) * stages, "image_size": 1}
    names = field_names(known.family)
    fill = {k: v for k, v in fill.items() if k in names and getattr(known, k) is None}
    if known.image_size is None and known.patch_size is not None and not known.absolute_position:
        fill.setdefault("image_size", known.patch_size * 2**stages)
    values = set_fields(replace(known, **fill))
    return whole(values) if set(names) <= values.keys() else None


def _named(known: Architecture, form: str) -> str:
    """A published model of the format with this architecture."""
    prefix = _PUBLISHED.get(form)
    if prefix is None:
        return ""
    free = ("image_size", "window_size", "pretrained_window_sizes", "keep_distillation_token")
    for name, net in ARCHITECTURES.items():
        if not name.startswith(prefix) or net.family != known.family:
            continue
        own = [f.name for f in fields(net) if f.name not in free]
        if all(getattr(known, f) in (None, getattr(net, f)) for f in own):
            return name
    return ""


def table(found: Inspection) -> Any:
    """Returns the rich table of an inspection."""
    from rich.table import Table

    rows = Table(title=found.source, title_justify="left", show_header=False)
    rows.add_column(no_wrap=True, style="bold")
    rows.add_column(overflow="fold")
    own = " (written by fd_large)" if found.own else ""
    rows.add_row("format", f"{found.form}: {found.what}{own}")
    rows.add_row("published model", found.named or "none of the table of models")
    if found.facts is not None:
        rows.add_row("licence, origin", f"{found.facts.licence}, {found.facts.origin}")
        rows.add_row("trained at", f"{found.facts.image_size} px")
    values = set_fields(found.architecture)
    rows.add_row("architecture", "\n".join(f"{k} {_plain(v)}" for k, v in values.items()))
    if found.unknown:
        rows.add_row("not told", f"{', '.join(found.unknown)} (--teacher.architecture.*)")
    if found.statistics is None:
        rows.add_row("statistics", "not told (--teacher.statistics)")
    else:
        mean, std = found.statistics
        rows.add_row("statistics", f"mean {_plain(mean)}, std {_plain(std)}")
    rows.add_row("parameters", f"{found.parameters:,} in {', '.join(found.dtypes) or 'no tensor'}")
    if found.match is not None:
        rows.add_row("matches", found.match.summary())
        for complaint in found.match.complaints:
            what, _, names = complaint.partition(": ")
            rows.add_row(what, names)
        if found.match.to_resize:
            rows.add_row("resized on loading", listed(found.match.to_resize))
    if found.dropped:
        rows.add_row("left out on purpose", listed(list(found.dropped)))
    return rows


def _plain(value: Any) -> str:
    return " ".join(map(_plain, value)) if isinstance(value, tuple | list) else str(value)
