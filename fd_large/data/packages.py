"""Optional packages that a dataset needs: missed in one sentence, and without torch."""

from __future__ import annotations

import os
import re
from importlib.metadata import version
from importlib.util import find_spec
from typing import Literal

from fd_large.data.braces import check_braces
from fd_large.data.weighted_roots import weighted_roots
from fd_large.errors import DataError
from fd_large.files import kind_of, unusable

PARQUET = ".parquet"
SAVED = ("state.json", "dataset_info.json")
"""Files that `datasets` writes beside a saved dataset."""
CLIENTS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
}
"""What fsspec needs besides for a scheme; fsspec knows many more schemes."""

# Schemes of fsspec whose files are templates, or whose servers run what they are sent; a chain
# (`A::B`) reaches them as well.
_PROGRAMS = {"reference", "dask", "jupyter", "jlab"}
# The first release that does not unpickle what a file's schema holds: CVE-2023-47248.
_OLDEST_PYARROW = (14, 0, 1)

# Bytes; a name that is longer cannot be.
_LONGEST_NAME = 255
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://")


def scheme_of(root: str) -> str:
    """The scheme of a URL; "" for a path."""
    match = _URL.match(root)
    return match.group(1) if match else ""


def is_url(root: str) -> bool:
    """Whether a root is a URL and no path."""
    return bool(scheme_of(root))


def name_of(url: str) -> str:
    """The name of a file: a path, or a URL without its query."""
    return url.partition("?")[0] if scheme_of(url) in ("http", "https") else url


def local_kind(
    root: str, *inside: str, where: str = "data.root"
) -> Literal["file", "folder", "other"] | None:
    """Returns what stands at a root, or below it, on this machine; None: nothing, or it is a URL.

    Args:
        root: As `data.root` takes it.
        inside: Names below it.
        where: The field that names it, for messages.

    Raises: DataError: if the file system refuses to say.
    """
    longest = max(map(len, os.fsencode(root).split(b"/")))
    if is_url(root) or ("{" in root and longest > _LONGEST_NAME):  # A long list of names.
        return None
    return kind_of(os.path.join(root, *inside), where=where, of=DataError)


def is_saved(root: str, where: str) -> bool:
    """Whether a root is a folder that `datasets` wrote with `save_to_disk`."""
    return local_kind(root, where=where) == "folder" and all(
        local_kind(root, name, where=where) == "file" for name in SAVED
    )


def listed(folder: str, where: str) -> list[str]:
    """Returns the names in a folder, sorted.

    Raises: DataError: if the file system refuses to say.
    """
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise unusable(where, error, folder, of=DataError) from error


def check_packages(root: str, *, where: str) -> None:
    """Refuses what a package is missing for, and braces that stand for too many names.

    Args:
        root: As `data.root` takes it.
        where: The field that names it, for messages.

    Raises: DataError: with the command that installs it, or the number of names.
    """
    check_braces(root, where=where)
    for part in weighted_roots(root, where=where):
        check_packages(part.root, where=f"{where} ({part.name})")
    if is_url(root):
        _check_client(root, where)
    if name_of(root).lower().endswith(PARQUET):
        require("pyarrow", "parquet files", where)
    elif root and is_saved(root, where):
        require("datasets", "a saved dataset", where)


def require(package: str, what: str, where: str) -> None:
    """Refuses a dataset whose package is missing.

    Raises: DataError: with the command that installs it, also in place of too old a release.
    """
    if find_spec(package) is None:
        raise DataError(
            f"{where}: {what}: the package {package} is needed; got nothing, expected it to be "
            f"installed. Install it: pip install {package}"
        )
    # datasets reads with pyarrow, too.
    numbers = re.findall(r"\d+", version("pyarrow"))[:3]
    if tuple(map(int, numbers)) < _OLDEST_PYARROW:
        raise DataError(
            f"{where}: {what}: too old a release of pyarrow, which may run code that a file holds; "
            f"got {version('pyarrow')}, expected 14.0.1 or later. pip install --upgrade pyarrow"
        )


def _check_client(root: str, where: str) -> None:
    scheme = scheme_of(root)
    if "::" in root or scheme in _PROGRAMS:
        raise DataError(
            f"{where}: a URL that another file says how to read; got {root!r}, expected one of an "
            "object store or a server. Name the images' own URL."
        )
    packages = " ".join(filter(None, ("fsspec", CLIENTS.get(scheme))))
    try:
        import fsspec

        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise DataError(
            f"{where}: {scheme}:// needs a package that is not installed; got {error}, expected "
            f"it. Install it: pip install {packages}"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{where}: no such kind of URL; got {root!r}, expected s3://, gs://, https:// or "
            "another that fsspec knows. Correct it, or name a folder."
        ) from error
