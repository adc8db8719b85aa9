"""The origin of weights: their licence and repository, as far as known.

The origin is found from the name of the source, without opening or downloading weights: when the
model card of a stored run is written, the teacher's weights may no longer exist on the machine.
"""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import NamedTuple

from fd_large import doors
from fd_large.backbones.registry import family_of, family_of_source
from fd_large.errors import WeightsError
from fd_large.files import kind_of
from fd_large.recipes.family import FamilyArchitecture
from fd_large.recipes.sections import RANDOM
from fd_large.weights.named import HUB, OPEN_CLIP, PACKAGE, SCHEMES
from fd_large.weights.push import REPOSITORY
from fd_large.weights.read import read_json

CARD = "README.md"
UNKNOWN = "unknown"
_SCHEMES = (*SCHEMES, RANDOM, "builtin:")
# Bytes of a model card that are read: its metadata is at the top, and some cards are very long.
_HEAD_BYTES = 1 << 16


class Origin(NamedTuple):
    """Licence and repository of weights.

    Attributes:
        licence: Licence in words, or UNKNOWN.
        repository: OWNER/NAME on the Hugging Face Hub; empty if none is known.
    """

    licence: str
    repository: str = ""


def is_random(source: str) -> bool:
    """Whether `source` stands for random weights, as "", `random` and `timm:NAME=random` do."""
    if source in ("", RANDOM):
        return True
    brought = family_of_source(source)
    scheme = brought[0].scheme if brought else None
    return scheme is not None and scheme.untrained(brought[1]) is not None


def origin_of(source: str, model: str, architecture: FamilyArchitecture | None) -> Origin:
    """Returns the known origin of a source of weights in a recipe, without network access.

    The name of the weights' model is `model`; its architecture is None if unknown.
    """
    if is_random(source):
        return Origin("random weights, which have none")
    if source.startswith(HUB):
        repository = source.removeprefix(HUB)
        return Origin(licence_of_card(file_beside(source, CARD)) or UNKNOWN, repository)
    if source.startswith(OPEN_CLIP):
        return Origin(UNKNOWN, _open_clip_repository(source.removeprefix(OPEN_CLIP)))
    if doors.is_own(source) or source.startswith(PACKAGE):
        return Origin(UNKNOWN)
    if brought := family_of_source(source):
        family, rest = brought
        facts = family.facts_of(family.architecture.named(rest))
        repository = facts.origin if facts and REPOSITORY.fullmatch(facts.origin) else ""
        return Origin((facts.licence if facts else "") or UNKNOWN, repository)
    path = Path(source.partition("#")[0])
    folder = path if kind_of(path) == "folder" else path.parent
    if stated := licence_of_card(folder / CARD) or _timm_licence(folder / "config.json"):
        return Origin(f"{stated}, as the files beside them say")
    published = family_of(architecture).published if architecture else None
    facts = published.facts.get(model) if published else None
    if facts and facts.licence:
        return Origin(f"{facts.licence} if they are those of {facts.origin}, else {UNKNOWN}")
    return Origin(UNKNOWN)


def without_folders(source: str) -> str:
    """Returns `source` without the folders of the user's machine, for publication.

    Of a path only the last part is kept, also in `module:PATH/TO/FILE.py:NAME`. Other sources stay
    unchanged.
    """
    if doors.is_own(source):
        return doors.PREFIX + Path(source.removeprefix(doors.PREFIX)).name
    return source if source.startswith(_SCHEMES) else Path(source).name


def file_beside(source: str, name: str) -> Path | None:
    """Returns the path of the file `name` in the folder of weights, or None if it is not there.

    The source is the folder, a file in it, or `hf:OWNER/NAME`, for which the file is looked up in
    the local cache of the Hub. For any other source, the result is None.
    """
    if source.startswith(HUB):
        return _cached(source.removeprefix(HUB), name)
    if source.startswith((*_SCHEMES, doors.PREFIX)):
        return None
    path = Path(source)
    beside = (path if kind_of(path) == "folder" else path.parent) / name
    return beside if kind_of(beside) == "file" else None


def licence_of_card(card: Path | None) -> str:
    """Returns the licence in the metadata of a model card, or "" if it states or is none."""
    if card is None or kind_of(card) != "file":
        return ""
    try:
        with card.open("rb") as file:
            head = file.read(_HEAD_BYTES).decode(errors="replace").replace("\r\n", "\n")
    except OSError:
        return ""
    if not head.startswith("---\n"):
        return ""
    metadata = head[4:].partition("\n---")[0]
    matches = {
        name: re.search(rf"^{name}:[ \t]*[\"']?([\w.+-]+)", metadata, re.MULTILINE)
        for name in ("license", "license_name")
    }
    stated = {name: match[1] for name, match in matches.items() if match}
    licence = stated.get("license", "")
    return stated.get("license_name", licence) if licence == "other" else licence


def _timm_licence(config: Path) -> str:
    """Returns the licence in timm's config.json; "" if it is missing, damaged, or states none."""
    if kind_of(config) != "file":
        return ""
    try:
        settings = read_json(config, where="export")
    except WeightsError:  # A damaged configuration only means that the licence is unknown.
        return ""
    stated = settings.get("pretrained_cfg") if isinstance(settings, dict) else None
    licence = stated.get("license") if isinstance(stated, dict) else None
    return licence if isinstance(licence, str) and re.fullmatch(r"[\w.+-]+", licence) else ""


def _cached(repository: str, name: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    try:
        cached = try_to_load_from_cache(repository, name)
    except ValueError:  # Not a name of a repository.
        return None
    return Path(cached) if isinstance(cached, str | os.PathLike) else None


def _open_clip_repository(name: str) -> str:
    try:
        import open_clip
    except ImportError:
        return ""
    config = open_clip.get_pretrained_cfg(*name.split("/", 1)) if "/" in name else None
    return (config or {}).get("hf_hub", "").strip("/")
