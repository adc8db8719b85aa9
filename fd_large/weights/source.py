"""Where weights come from, in one word of the user's, and what is known of them.

A source is a path (also `FILE#teacher` and the like), `package:NAME`, `hf:REPO`,
`open_clip:ARCH/TAG`, `timm:NAME` or `module:package.file:function`. All but the last two end in a
file; models of timm and of one's own bring their tensors themselves. `open_weights` reads them all as
weights of one of our models; as teachers, the last two are models of their own (settle.py). What a path
means beside files (a run's checkpoint) is read by whoever `serve`s it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fd_large.backbones.custom.custom import build_own
from fd_large.backbones.statistics import Statistics
from fd_large.errors import WeightsError, nearest
from fd_large.recipes.architectures import Architecture, filled
from fd_large.recipes.family import FamilyArchitecture, Transformer
from fd_large.weights.beside import Beside, beside, open_clip
from fd_large.weights.coverage import Fitted, margin_of
from fd_large.weights.formats import FORMATS, Format, detect
from fd_large.weights.read import Tensors, read, split_part
from fd_large.weights.recognise import KNOWN_HEADS, recognise
from fd_large.weights.swin import expand_shared_bias, first_stages, fresh_norm
from fd_large.weights.translation import Piece, Shape, translated

TIMM, MODULE, HUB, OPEN_CLIP = "timm:", "module:", "hf:", "open_clip:"
_HUB_FILES = ("*.json", "*.safetensors", "*.bin")


@dataclass(frozen=True)
class Weights:
    """An opened file of a model, in our names; nothing is read yet.

    Attributes:
        source: As the user gave it; of a run's folder the checkpoint that was taken.
        form: Its format's name.
        file: Its tensors as they are.
        pieces: Our names to what makes each.
        dropped: The file's names that are left out on purpose.
        unfit: The file's names that make no tensor.
        found: What names and shapes tell of the architecture; None in other fields.
        told: What the format and a configuration beside the file tell of it.
        statistics: That it was trained with, if they are known.
        own: Whether this project wrote it.
    """

    source: str
    form: str
    file: Tensors
    pieces: dict[str, Piece]
    dropped: list[str]
    unfit: list[str]
    found: Architecture
    told: Architecture
    statistics: Statistics | None
    own: bool

    @property
    def format(self) -> Format:
        """The line of the table."""
        return FORMATS[self.form]

    @property
    def what(self) -> str:
        """File and format in words."""
        return f"{self.source} ({'this project, ' if self.own else ''}{self.format.what})"

    def shapes(self) -> dict[str, Shape]:
        """Shapes in our names."""
        return {name: piece.shape(self.file.shape) for name, piece in self.pieces.items()}

    def unknown(self, wanted: Architecture) -> tuple[str, ...]:
        """Fields of the format that neither file, nor configuration, nor the user tells."""
        return tuple(
            name
            for name in self.format.ask
            if getattr(self.told, name) is None and getattr(wanted, name) is None
        )

    def adapted(
        self, architecture: Transformer, expected: Mapping[str, Shape]
    ) -> tuple[dict[str, Piece], list[str]]:
        """The pieces for a model, and what was done to those of the file, in words.

        Args:
            architecture: Of the model, every field of its family set. A Swin of fewer stages takes
                the first ones, with a fresh final norm.
            expected: Shape of every parameter of the model.
        """
        pieces, notes = self.pieces | {name: Piece((name,)) for name in self.unfit}, []
        if self.dropped:
            notes.append(f"left out on purpose: {_groups(self.dropped)}")
        stages = len(architecture.depths or ())
        if (
            "swin" in self.format.family
            and self.found.depths
            and 0 < stages < len(self.found.depths)
        ):
            width = architecture.embed_dim * 2 ** (stages - 1)
            pieces = first_stages(pieces, stages, width)
            notes.append(
                f"the first {stages} of {len(self.found.depths)} stages, and a final norm that "
                "only normalises"
            )
        shared = expand_shared_bias(pieces, dict(expected))
        if shared is not pieces:
            pieces = shared
            notes.append("the shared position bias is copied to every block")
        if "norm.weight" not in pieces and any(_OF_THE_MEAN.search(n) for n in self.dropped):
            pieces = pieces | fresh_norm(architecture.embed_dim)
            notes.append(
                "the file has no norm for tokens, only one for their mean: a norm that only "
                "normalises"
            )
        if self.found.distillation_token:
            kept = architecture.keep_distillation_token
            notes.append(
                f"the distillation token is {'kept in' if kept else 'dropped from'} the feature map"
            )
        return pieces, notes

    def fitted(
        self,
        architecture: Transformer,
        expected: Mapping[str, Shape],
        *,
        allow: tuple[str, ...] = (),
        where: str = "weights",
        remedy: str = "",
    ) -> Fitted:
        """The tensors for a model, checked against its shapes.

        Args:
            architecture: Of the model, every field of its family set.
            expected: Shape of every parameter of the model.
            allow: Patterns of names that may be missing or left over.
            where: What the user set, for messages.
            remedy: What the user can do about tensors that do not fit.

        Raises: WeightsError: if the file does not cover the model.
        """
        pieces, notes = self.adapted(architecture, expected)
        return Fitted(
            pieces,
            self.file,
            expected,
            allow=allow,
            what=self.what,
            where=where,
            margin=0.0 if self.own else margin_of(self.form),
            notes=notes,
            remedy=remedy,
        )


class Stored(NamedTuple):
    """A model of this project's that no weights file holds.

    Attributes:
        path: By which it is opened again, whatever is stored since.
        file: Its tensors in our names.
        architecture: Every field of its family set.
        statistics: By which its images are normalised.
    """

    path: Path
    file: Tensors
    architecture: FamilyArchitecture
    statistics: Statistics


# (path, what the user set) -> the model, or None where the path means nothing to it.
StoredReader = Callable[[Path, str], Stored | None]
_readers: list[StoredReader] = []


def serve(reader: StoredReader) -> None:
    """Has paths asked of a reader before they are taken for files; for rooms that may not be here.

    Args:
        reader: Without collectives.
    """
    if reader not in _readers:
        _readers.append(reader)


class Told(NamedTuple):
    """Where a source ends, and what its name tells of the model; tensors where that is no file."""

    path: Path
    architecture: Architecture = Architecture()
    statistics: Statistics | None = None
    tensors: Tensors | None = None


def open_weights(source: str | Path, *, where: str = "weights") -> Weights:
    """Opens a source that ends in a file, finds its format, and what is known of its model.

    Args:
        source: See above; `#student`, `#teacher` or `#projector` after a path name a part of it.
        where: What the user set, for messages.

    Raises: WeightsError: if it cannot be had or read, or is of no known format.
    """
    told = locate(str(source), where=where)
    name, part = split_part(told.path, where=where)
    stored = None
    if told.tensors is None and part in ("", "student"):
        stored = _stored(Path(name), where)
    if told.tensors is not None:
        file, names = told.tensors, []
    elif stored is None:
        file, names = _part(read(name, where=where, part=part), part, name, where)
    else:
        file, names, source = stored.file, [], stored.path
    form = detect(file, where=where, wrapping=file.wrapping)
    if form == "open_clip" and part == "teacher":
        form = "openai_clip"  # The only CLIP that the Feature-Distillation repository teaches with.
    line = FORMATS[form]
    translation = translated(file, line.rule)
    pieces = translation.pieces
    dropped = [*names, *translation.dropped]
    projector = {n: p for n, p in pieces.items() if n.startswith("projection.")}
    if part == "projector":
        pieces = projector
    elif projector:
        pieces = {n: p for n, p in pieces.items() if n not in projector}
        dropped += [source for piece in projector.values() for source in piece.sources]
    config = Beside(Architecture(), None)
    if stored is not None:
        config = Beside(Architecture(**stored.architecture.values()), stored.statistics, own=True)
    elif file.path:
        config = beside(file.path, form, where=where)
    known = filled(told.architecture, config.architecture)
    statistics = told.statistics or config.statistics
    if not config.own:  # Names that are ours alone say nothing of who trained the weights.
        known, statistics = filled(known, line.facts), statistics or line.statistics
    shapes = {ours: piece.shape(file.shape) for ours, piece in pieces.items()}
    found = _recognised(line.family, shapes, file, f"{where}: {source}")
    if line.family == "vit" and found.embed_dim in KNOWN_HEADS:
        known = filled(known, Architecture(num_heads=(KNOWN_HEADS[found.embed_dim],)))
    return Weights(
        source=str(source),
        form=form,
        file=file,
        pieces=pieces,
        dropped=dropped,
        unfit=translation.unfit,
        found=found,
        told=known,
        statistics=statistics,
        own=config.own,
    )


def _recognised(
    family: str, shapes: Mapping[str, Shape], file: Tensors, where: str
) -> Architecture:
    """What the tensors show.

    Raises: WeightsError: if one has no elements, or has a shape that no model of the family has.
    """
    empty = [name for name, shape in shapes.items() if 0 in shape]
    if empty:
        raise WeightsError(
            f"{where}: tensors without numbers; got {len(empty)} of {len(shapes)}, "
            f"{empty[0]} {shapes[empty[0]]} the first, expected whole ones. state_dict() of a model "
            "in pieces (ZeRO-3) holds none: gather it before it is saved."
        )
    try:
        return recognise(family, shapes, file)
    except (ValueError, IndexError) as error:
        raise WeightsError(
            f"{where}: shapes of no {family} model; got patch_embed.proj.weight "
            f"{shapes['patch_embed.proj.weight']} and others, expected (width, 3, patch, patch) "
            "and tables of its kind. Use the weights of another net."
        ) from error


def locate(source: str, *, where: str = "weights") -> Told:
    """Returns the file or folder of a source, downloading it where that is what it says.

    Raises: WeightsError: if a package is not installed, or the weights cannot be had.
    """
    if source.startswith(HUB):
        return Told(_from_hub(source.removeprefix(HUB), where))
    if source.startswith(OPEN_CLIP):
        return _from_open_clip(source.removeprefix(OPEN_CLIP), where)
    if source.startswith(TIMM):
        return _from_timm(source, where)
    if source.startswith(MODULE):
        net = build_own(source.removeprefix(MODULE), where=f"{where} module")
        return Told(
            Path(source),
            statistics=getattr(net, "statistics", None),
            tensors=Tensors(net.state_dict()),
        )
    return Told(Path(source))


def _stored(path: Path, where: str) -> Stored | None:
    return next((found for reader in _readers if (found := reader(path, where))), None)


def _from_timm(source: str, where: str) -> Told:
    from fd_large.weights import timm_backbone, timm_config  # A second that others are spared.

    name = source.removeprefix(TIMM)
    net = timm_backbone.pretrained(source, name, where=where)
    return Told(
        Path(source),
        timm_config.of_net(net, where=where),
        timm_config.statistics_of(name),
        Tensors(net.state_dict()),
    )


def _from_hub(repository: str, where: str) -> Path:
    # timm, which is always there, brings it.
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(repository, allow_patterns=list(_HUB_FILES)))
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"{where}: cannot be had from Hugging Face; got {_first_line(error)} for {repository}, "
            "expected OWNER/NAME of a repository in the cache or within reach. Fetch its "
            "files elsewhere, and give the path of their folder."
        ) from error


def _from_open_clip(name: str, where: str) -> Told:
    try:
        import open_clip as package
    except ImportError as error:
        raise WeightsError(
            f"{where}: open_clip is not installed; got {OPEN_CLIP}{name}, expected the package "
            "that knows it. pip install 'fd_large[open_clip]', or give the path of a file."
        ) from error
    architecture, _, tag = name.partition("/")
    config = package.get_model_config(architecture)
    if config is None:
        raise WeightsError(
            f"{where}: open_clip has no such model; got {architecture!r}, "
            f"{nearest(architecture, package.list_models())}. Use one of these."
        )
    pretrained = package.get_pretrained_cfg(architecture, tag) if tag else None
    if not pretrained:
        tags = package.list_pretrained_tags_by_model(architecture)
        raise WeightsError(
            f"{where}: open_clip has no such weights of {architecture}; got {tag!r}, expected one "
            f"of {', '.join(tags) or 'none: it has none'}. Name it as "
            f"{OPEN_CLIP}{architecture}/TAG."
        )
    try:
        path = package.download_pretrained(pretrained)
    except (OSError, ValueError, RuntimeError) as error:
        raise WeightsError(
            f"{where}: cannot be had from open_clip; got {_first_line(error)} for {name}, expected "
            "weights in the cache or within reach. Fetch the file elsewhere, and give its path "
            "and --teacher.architecture.activation."
        ) from error
    # The weights' own line says which activation they were trained with.
    quick = pretrained.get("quick_gelu", config.get("quick_gelu", False))
    statistics = None
    if pretrained.get("mean") and pretrained.get("std"):
        statistics = Statistics(tuple(pretrained["mean"]), tuple(pretrained["std"]))
    told = open_clip({**config, "quick_gelu": quick}, where=where)
    return Told(Path(path), told, statistics)


def _part(file: Tensors, part: str, name: str, where: str) -> tuple[Tensors, list[str]]:
    """The model asked for, of a file of Feature-Distillation that holds several; and what is not.

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


_TEACHER = "feature_model."
# timm's and Hugging Face's names of a norm that follows the mean of the tokens.
_OF_THE_MEAN = re.compile(r"(^|\.)(fc_norm|pooler\.layernorm)\.weight$")


def _groups(names: list[str]) -> str:
    """Names by their first word, with counts."""
    groups: dict[str, int] = {}
    for name in names:
        groups[name.split(".")[0]] = groups.get(name.split(".")[0], 0) + 1
    return ", ".join(f"{name} ({count})" for name, count in groups.items())


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
