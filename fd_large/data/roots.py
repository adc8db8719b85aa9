"""Names of datasets, looked at before torch is imported; what is in them is read later."""

from __future__ import annotations

import os
import tarfile
from functools import partial

from fd_large import doors
from fd_large.data.packages import CLIENTS, PARQUET, is_url, local_kind
from fd_large.data.weighted_roots import weighted_roots
from fd_large.errors import DataError, check_all, nearest
from fd_large.files import unusable
from fd_large.recipes.tables import keys_of

BUILTIN = "builtin:"
_FORMS = (
    "a folder of images, tar shards or parquet files, FILE.tar, FILE.parquet, or a URL of such "
    "files"
)
_SCHEMES = (BUILTIN, doors.PREFIX, *(f"{scheme}://" for scheme in CLIENTS))
# A folder with so many folders and no file is looked at when it is listed.
_MOST_FOLDERS = 1000


def require_dataset(root: str, *, where: str) -> None:
    """Refuses what is no dataset, as far as its name and a first look tell.

    Args:
        root: As `data.root` takes it; a path at which nothing stands is passed over.
        where: The field that names it, for messages.

    Raises: DataError: naming the field; ConfigError: for code without `module:` before it.
    """
    if parts := weighted_roots(root, where=where):
        check_all(
            *(partial(require_dataset, part.root, where=f"{where} ({part.name})") for part in parts)
        )
        return
    if not root:
        raise DataError(f"{where}: no images; got '', expected {_FORMS}. Set --{where} FOLDER.")
    if doors.is_own(root) or is_url(root):
        return
    if root.startswith(BUILTIN):
        _require_builtin(root, where)
        return
    kind = local_kind(root, where=where)
    if kind == "file":
        _require_archive(root, where)
    elif kind == "folder":
        _require_file_in(root, where)
    elif kind is None and doors.SCHEME.match(root):
        doors.refuse_scheme(root, _SCHEMES, where=where, of=DataError)


def _require_builtin(root: str, where: str) -> None:
    known = keys_of("data/photographs.py", "SETS")
    if root not in known:
        raise DataError(
            f"{where}: no such built-in set; got {root!r}, {nearest(root, known)}. Set --{where} "
            "to one of these or to a folder."
        )


def _require_archive(root: str, where: str) -> None:
    if root.lower().endswith(PARQUET):
        return
    wrong = "neither a folder nor a tar file"
    if root.lower().endswith(".tar"):
        try:
            with open(root, "rb") as file:
                tarfile.TarInfo.frombuf(file.read(tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
            return
        except tarfile.EOFHeaderError:  # type: ignore[attr-defined]
            return  # An archive without members, of which more is said when it is indexed.
        except OSError as error:
            raise unusable(where, error, root, of=DataError) from error
        except (tarfile.HeaderError, ValueError, OverflowError):
            wrong = "a file that is no tar archive, whatever it is called"
    raise DataError(f"{where}: {wrong}; got {root!r}, expected {_FORMS}. Set --{where} FOLDER.")


def _require_file_in(root: str, where: str) -> None:
    """Refuses a folder without a file; of one with millions, a few are listed."""
    folders = [root]
    for _ in range(_MOST_FOLDERS):
        if not folders:
            raise DataError(
                f"{where}: no file in the folder or below it; got {root!r}, expected "
                f"{_FORMS}. Set --{where} to a folder with images."
            )
        try:
            with os.scandir(folders.pop()) as entries:
                for entry in entries:
                    if entry.is_dir():
                        folders.append(entry.path)
                    elif not entry.name.startswith("."):
                        return
        except OSError:
            return  # Whoever lists it says why.
