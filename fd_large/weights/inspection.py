"""Describes a weights file: its format, architecture, number of parameters, and fit to a model."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from fd_large.backbones.exports import DECODER
from fd_large.backbones.published import WeightFacts
from fd_large.backbones.registry import family_of, parameter_shapes, statistics_of
from fd_large.backbones.statistics import Statistics
from fd_large.errors import ConfigError, ShapeError, first_names, printable
from fd_large.files import kind_of
from fd_large.recipes.architectures import (
    ARCHITECTURES,
    Architecture,
    field_names,
    filled,
    name_of,
    overrides,
    resolve,
    set_fields,
    whole,
)
from fd_large.recipes.family import FamilyArchitecture
from fd_large.weights.coverage import Match, match
from fd_large.weights.export import INDEX, NAME
from fd_large.weights.published import FORMATS, PublishedWeights
from fd_large.weights.read import OTHER
from fd_large.weights.resolve import ResolvedWeights, Sources, Stored


@dataclass(frozen=True)
class Inspection:
    """The description of a weights file.

    Attributes:
        source: The source as the user gave it.
        form: Name of the format.
        what: The format in words.
        architecture: Known fields of the architecture; None in unknown fields.
        statistics: Image statistics that the weights were trained with; None if unknown.
        named: Name of a model with this architecture, or "".
        parameters: Number of elements in the model's tensors.
        dtypes: Names of their dtypes.
        match: Comparison of the file with the model that it shows, or with the requested model;
            None if too little is known, or the file is a run or export of a family without
            published files.
        own: Whether this project wrote the file.
        unknown: Architecture fields that neither the file nor a configuration shows.
        facts: Facts of the published weights of the named model, or None.
        dropped: Names of tensors that are intentionally left out.
        other_part: "student" or "teacher", if the file has that model besides the described model;
            else "".
    """

    source: str
    form: str
    what: str
    architecture: Architecture
    statistics: Statistics | None
    named: str
    parameters: int
    dtypes: tuple[str, ...]
    match: Match | None
    own: bool = False
    unknown: tuple[str, ...] = ()
    facts: WeightFacts | None = None
    dropped: tuple[str, ...] = ()
    other_part: str = ""


def inspect(
    source: str | Path, *, model: str = "auto", sources: Sources | None = None
) -> Inspection:
    """Describes a weights file from its headers, without reading tensors.

    Args:
        source: A path, `hf:REPO`, `package:NAME` or `open_clip:ARCH/TAG`.
        model: Name of a model with which the file is compared; "auto" is the model that the file
            shows.
        sources: Opens the source. None is enough for files, but does not open runs or checkpoints.

    Raises:
        WeightsError: If the source cannot be read or has no known format.
        ConfigError: For an unknown model.
    """
    sources = sources or Sources()
    path = Path(source)
    beside = path.name in (NAME, INDEX) and kind_of(path) == "file"
    if stored := sources.resolve(path.parent if beside else source).unpublished:
        if model != "auto":
            raise ConfigError(
                f"--model: the weights are of {name_of(stored.architecture)}, which has its own "
                f"names of tensors; got {model}, expected auto. Leave out --model."
            )
        return _of_own(source, stored)
    resolved = sources.resolve(source)
    if model == "auto" and (described := resolved.described):
        architecture = resolve(described.family.architecture.family, described.architecture)
        description = f"folder of {architecture.own_name}"
        return _of_library(resolved, architecture, description, described.statistics)
    if model != "auto" and family_of(named_model := resolve(model)).matched:
        description = f"tensors of {named_model.own_name}, as --model says"
        return _of_library(resolved, named_model, description, statistics_of("", named_model))
    weights = resolved.published
    published, form = weights.published, FORMATS[weights.form].format
    known = _merged(weights)
    unknown = sorted(
        name
        for name in field_names(weights.family.architecture.family)
        if getattr(known, name) is None and name not in published.ours
    )
    compared = None
    if model != "auto":
        compared = _compared(weights, resolve(model))
    elif (shown := _for_shapes(known, published.without_shape(known))) is not None:
        compared = _compared(weights, shown)
    named = _named(known, form.models, published.free | published.ours.keys())
    tensor_names = [name for piece in weights.pieces.values() for name in piece.sources]
    return Inspection(
        source=str(source),
        form=weights.form,
        what=form.what,
        own=weights.own,
        architecture=known,
        unknown=tuple(unknown),
        statistics=weights.statistics,
        named=named,
        facts=published.facts.get(named),
        parameters=sum(map(math.prod, weights.shapes().values())),
        dtypes=weights.file.dtypes(tensor_names),
        match=compared,
        dropped=tuple(weights.dropped),
        other_part=weights.file.other_part,
    )


def _of_library(
    weights: ResolvedWeights,
    architecture: FamilyArchitecture,
    description: str,
    statistics: Statistics | None,
) -> Inspection:
    """Describes weights whose model a library builds, and a configuration or the user names.

    `description` is the format in words.
    """
    fitted = weights.fitted(architecture)
    return Inspection(
        source=weights.source,
        form=architecture.family,
        what=description,
        architecture=overrides(architecture),
        statistics=statistics,
        named=architecture.own_name,
        parameters=fitted.match.total,
        dtypes=fitted.dtypes,
        match=fitted.match,
    )


def _of_own(source: str | Path, stored: Stored) -> Inspection:
    """Describes a model that this project stored and whose family has no published files.

    The user's code that makes the model is not imported.
    """
    is_file = stored.file.path is not None
    dropped = [name for name in stored.sizes if is_file and name.startswith(DECODER)]
    return Inspection(
        source=str(source),
        form="export" if is_file else "checkpoint",
        what="exported student" if is_file else f"student of a run, {stored.path.name}",
        own=True,
        architecture=overrides(stored.architecture),
        statistics=stored.statistics,
        named=name_of(stored.architecture),
        parameters=sum(size for name, size in stored.sizes.items() if name not in dropped),
        dtypes=stored.file.dtypes(stored.sizes),
        match=None,
        dropped=tuple(dropped),
    )


def _merged(weights: PublishedWeights) -> Architecture:
    """Returns the architecture fields of `weights` that are known, with None in other fields.

    The image size and the window size are those that the format or a configuration states, or else
    those that the tensors show. For all other fields, a value that the tensors show takes
    precedence over a stated one.
    """
    stated = set_fields(weights.stated)
    sizes = {name: stated[name] for name in ("image_size", "window_size") if name in stated}
    return replace(filled(weights.found, weights.stated), **sizes)


def _compared(weights: PublishedWeights, architecture: FamilyArchitecture) -> Match:
    expected = parameter_shapes(architecture)
    pieces, _ = weights.adapted(architecture, expected)
    return match(
        {name: piece.shape(weights.file.shape) for name, piece in pieces.items()}, expected
    )


def _for_shapes(known: Architecture, without_shape: dict[str, Any]) -> FamilyArchitecture | None:
    """Returns a complete architecture whose shapes are those of the known fields.

    `without_shape` has values for unknown fields that affect no shape. The result is None if
    another field is unknown, or no model has these fields.
    """
    values = without_shape | set_fields(known)
    try:
        model = whole(values)
        parameter_shapes(model)
    except (ConfigError, ShapeError):
        return None
    return model


def _named(known: Architecture, prefix: str, free: frozenset[str]) -> str:
    """Returns the name of a named model that agrees with the known fields, or "".

    The name begins with `prefix`, that of the format's models ("" if there are none). The fields in
    `free` are not compared.
    """
    for name, model in ARCHITECTURES.items():
        if not prefix or not name.startswith(prefix) or model.family != known.family:
            continue
        known_fields = [f.name for f in fields(model) if f.name not in free]
        if all(getattr(known, f) in (None, getattr(model, f)) for f in known_fields):
            return name
    return ""


def table(inspection: Inspection) -> Any:
    """Returns `inspection` as a table of the package rich, for the terminal."""
    from rich.table import Table
    from rich.text import Text

    rows = Table(title=Text(printable(inspection.source)), title_justify="left", show_header=False)
    rows.add_column(no_wrap=True, style="bold")
    rows.add_column(overflow="fold")

    def row(label: str, value: str) -> None:
        # As it is: names of a file may look like markup, or hold commands to a terminal.
        rows.add_row(label, Text(printable(value)))

    origin = " (written by fd_large)" if inspection.own else ""
    row("format", f"{inspection.form}: {inspection.what}{origin}")
    if inspection.other_part:
        beside = inspection.other_part
        row("part", f"{OTHER[beside]}; the file holds the {beside} too: #{beside}")
    published = inspection.match is not None or not inspection.own
    row("published model" if published else "model", inspection.named or "none of the named models")
    if inspection.facts is not None:
        row("licence, origin", f"{inspection.facts.licence}, {inspection.facts.origin}")
        row("trained at", f"{inspection.facts.image_size} px")
    values = set_fields(inspection.architecture)
    row("architecture", "\n".join(f"{k} {_plain(v)}" for k, v in values.items()))
    if inspection.unknown:
        row("unknown", f"{', '.join(inspection.unknown)} (--teacher.architecture.*)")
    if inspection.statistics is None:
        row("statistics", "unknown (--teacher.statistics)")
    else:
        mean, std = inspection.statistics
        row("statistics", f"mean {_plain(mean)}, std {_plain(std)}")
    row("parameters", f"{inspection.parameters:,} in {', '.join(inspection.dtypes) or 'no tensor'}")
    if inspection.match is not None:
        row("matches", inspection.match.summary())
        for complaint in inspection.match.complaints:
            problem, _, names = complaint.partition(": ")
            row(problem, names)
        if inspection.match.to_resize:
            row("resized on loading", first_names(inspection.match.to_resize))
    if inspection.dropped:
        row("left out on purpose", first_names(inspection.dropped))
    return rows


def _plain(value: Any) -> str:
    return " ".join(map(_plain, value)) if isinstance(value, tuple | list) else str(value)
