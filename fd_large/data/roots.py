"""Parses and checks the values of `data.root`, before torch is imported.

A root names a dataset. A root is a path, a URL, a pattern of shards with braces, a built-in
dataset, a source of the user's own, or a weighted sum of several datasets:

    0.5 /data/imagenet + 0.3 web=/data/web/shards + 0.2 s3://bucket/places/

In a sum each dataset has a weight in front, and may have a name, as `web` here. Without a name, the
last part of its path is the name of the dataset.

In all functions, `root` is the value of `data.root` or of a field like it, and `where` is the name
of this field, with which messages begin.
"""

from __future__ import annotations

import math
import os
import re
import tarfile
from collections.abc import Sequence
from fractions import Fraction
from functools import partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import product
from typing import Any, Literal, NamedTuple

from fd_large import doors
from fd_large.errors import DataError, check_all, nearest
from fd_large.files import kind_of, unusable
from fd_large.recipes.tables import keys_of

PARQUET = ".parquet"
SAVED = ("state.json", "dataset_info.json")
"""JSON files that `datasets` writes into the folder of a saved dataset."""
SAVED_PARTS = "dataset_dict.json"
"""The file that `datasets` writes for a saved dataset of several parts."""
CLIENTS = {
    "s3": "s3fs",
    "s3a": "s3fs",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "http": "aiohttp",
    "https": "aiohttp",
    "hf": "huggingface_hub",
}
"""The package that fsspec needs for each scheme; fsspec also knows schemes that are not here."""

# Schemes of fsspec whose files are templates, or whose servers run code that they are sent. A chain
# of schemes (`A::B`) reaches them as well.
_PROGRAMS = {"reference", "dask", "jupyter", "jlab"}
# The first release that does not unpickle the contents of a file's schema: CVE-2023-47248.
_OLDEST_PYARROW = (14, 0, 1)

# In bytes; file systems have no longer names.
_LONGEST_NAME = 255
_URL = re.compile(r"([a-z][a-z0-9+.-]*)://")
BRACES = re.compile(r"\{([^{}]*)\}")
GLOB = re.compile(r"[*?\[]")
_RANGE = re.compile(r"(\d+)\.\.(\d+)")
_MOST_NAMES, _MOST_DIGITS = 1_000_000, 18
_MOST_CHARACTERS = 1 << 28
_TERM = re.compile(r"(\d+\.?\d*|\.\d+)\s+(?:([A-Za-z]\w*)=)?(\S.*)")
# More than sensible weights need; the pattern of an order has as many entries.
MAX_PERIOD = 100_000
BUILTIN = "builtin:"
_FORMS = (
    "a folder of images, tar shards or parquet files, FILE.tar, FILE.parquet, or a URL of such "
    "files"
)
_SCHEMES = (BUILTIN, doors.PREFIX, *(f"{scheme}://" for scheme in CLIENTS))
# Number of folders in which a file is looked for; if none has one, the listing finds out.
_MOST_FOLDERS = 1000


def scheme_of(root: str) -> str:
    """Returns the scheme of a URL, such as "s3"; "" if `root` is no URL."""
    match = _URL.match(root)
    return match.group(1) if match else ""


def is_url(root: str) -> bool:
    """Whether `root` is a URL instead of a path."""
    return bool(scheme_of(root))


def name_of(url: str) -> str:
    """Returns a path or URL without its query.

    Only an http or https URL has a query, which begins at the first "?".
    """
    return url.partition("?")[0] if scheme_of(url) in ("http", "https") else url


def local_kind(
    root: str, *inside: str, where: str = "data.root"
) -> Literal["file", "folder", "other"] | None:
    """Returns what kind of local file a path is, or None if nothing is there.

    The path is the root, or a path below the root with the parts `inside`. The result is also None
    for a root that cannot be a path: a URL, or a pattern with braces that is longer than a file
    name may be.

    Raises: DataError: if the file system does not allow the look-up.
    """
    longest = max(map(len, os.fsencode(root).split(b"/")))
    if is_url(root) or ("{" in root and longest > _LONGEST_NAME):  # A long list of names.
        return None
    return kind_of(os.path.join(root, *inside), where=where, of=DataError)


def is_saved(root: str, where: str) -> bool:
    """Whether a root is a folder that `save_to_disk` of Hugging Face's `datasets` wrote."""
    return local_kind(root, where=where) == "folder" and all(
        local_kind(root, name, where=where) == "file" for name in SAVED
    )


def listed(folder: str, where: str) -> list[str]:
    """Returns the sorted names of the files and folders in a folder.

    Raises: DataError: if the folder cannot be listed.
    """
    try:
        return sorted(os.listdir(folder))
    except OSError as error:
        raise unusable(where, error, folder, of=DataError) from error


def check_packages(root: str, *, where: str) -> None:
    """Checks that the packages that a root needs are installed, and checks the root's braces.

    Raises: DataError: if a package is missing, or if braces stand for more than a million names.
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


def require(package: str, source: str, where: str) -> None:
    """Checks that a package is installed, and that pyarrow is recent enough.

    `source` is the kind of dataset that needs the package, for messages.

    Raises: DataError: if the package is missing, or if the release of pyarrow may run code that is
        in a file. The message has the command that installs the package.
    """
    if find_spec(package) is None:
        raise DataError(
            f"{where}: {source}: the package {package} is needed; got nothing, expected it to be "
            f"installed. Install it: pip install {package}"
        )
    # datasets reads with pyarrow, too.
    numbers = re.findall(r"\d+", version("pyarrow"))[:3]
    if tuple(map(int, numbers)) < _OLDEST_PYARROW:
        raise DataError(
            f"{where}: {source}: a release of pyarrow that is too old, and may run code in a file; "
            f"got {version('pyarrow')}, expected 14.0.1 or later. pip install --upgrade pyarrow"
        )


def _check_client(root: str, where: str) -> None:
    scheme = scheme_of(root)
    if "::" in root or scheme in _PROGRAMS:
        raise DataError(
            f"{where}: a URL that leads through another file or a program; got {root!r}, expected "
            "the URL of an object store or a server. Name the images' own URL."
        )
    packages = " ".join(filter(None, ("fsspec", CLIENTS.get(scheme))))
    try:
        import fsspec

        fsspec.get_filesystem_class(scheme)
    except ImportError as error:
        raise DataError(
            f"{where}: {scheme}:// needs a package that is not installed; got {error}, expected "
            f"the package. Install it: pip install {packages}"
        ) from error
    except ValueError as error:
        raise DataError(
            f"{where}: unknown kind of URL; got {root!r}, expected s3://, gs://, https:// or "
            "another that fsspec knows. Correct the URL, or name a folder."
        ) from error


def expand_braces(pattern: str, *, where: str = "data.root") -> list[str]:
    """Returns all names that a path or URL stands for, as a shell expands braces.

    "{00..12}" stands for the numbers from 00 to 12, with leading zeros, and "{a,b}" for a and b.
    Braces cannot be nested.

    Raises: DataError: if the pattern stands for more than a million names, or a number in it has
        too many digits.
    """
    parts = _parts(pattern, where)
    written = ([format(choice, spec) for choice in choices] for choices, spec in parts)
    return ["".join(chosen) for chosen in product(*written)]


def check_braces(pattern: str, *, where: str) -> None:
    """Checks the braces of a path or URL without expanding them; raises as `expand_braces`."""
    _parts(pattern, where)


def _parts(pattern: str, where: str) -> list[tuple[Sequence[Any], str]]:
    """Splits a path or URL into its parts inside and outside of braces.

    Returns: for each part, in order, the texts or numbers that may stand there, and the format
        specification with which they are written. A part outside of braces has one text.
    Raises: DataError: as `expand_braces`.
    """
    # text, inside, text, inside, ..., text
    parts = [
        _inside(text, where) if index % 2 else ([text], "")
        for index, text in enumerate(BRACES.split(pattern))
    ]
    count = math.prod(len(choices) for choices, _ in parts)
    if count > _MOST_NAMES or count * len(pattern) > _MOST_CHARACTERS:
        shown = pattern if len(pattern) <= 200 else f"{pattern[:200]}..."
        got = f"{count:,}" if count < 10**15 else "more than 10^15"
        raise DataError(
            f"{where}: {shown}: braces with too many names; got {got}, expected at most "
            f"{_MOST_NAMES:,}. Correct the numbers, or name a folder."
        )
    return parts


def _inside(text: str, where: str) -> tuple[Sequence[Any], str]:
    if match := _RANGE.fullmatch(text):
        ends = [digits.lstrip("0") or "0" for digits in match.groups()]
        if max(map(len, ends)) > _MOST_DIGITS:
            raise DataError(
                f"{where}: {{{text[:40]}}}: numbers that are too long; got more than "
                f"{_MOST_DIGITS} digits, expected fewer digits. Correct the numbers."
            )
        first, last = map(int, ends)
        step = 1 if first <= last else -1
        return range(first, last + step, step), f"0{len(match[1])}d"
    return text.split(",") if "," in text else [f"{{{text}}}"], ""


class WeightedRoot(NamedTuple):
    """A dataset of a weighted sum.

    Attributes:
        name: Name of the dataset, for messages and for settings of single datasets.
        root: Root of the dataset; see `open_images`.
        share: The weight as a whole number. Of every n images in an epoch's order, where n is the
            sum of all shares, the dataset provides this number.
    """

    name: str
    root: str
    share: int


def weighted_roots(root: str, *, where: str = "data.root") -> tuple[WeightedRoot, ...]:
    """Returns the datasets of a weighted sum, or an empty tuple if `root` is not a weighted sum.

    Raises: DataError: if a term is malformed, two datasets have the same name, or the weights need
        whole numbers whose sum exceeds `MAX_PERIOD`.
    """
    texts = root.split(" + ")
    matches = [_TERM.fullmatch(text.strip()) for text in texts]
    if len(texts) < 2 or matches[0] is None:
        return ()
    terms: dict[str, tuple[str, Fraction]] = {}
    for text, term in zip(texts, matches, strict=True):
        if term is None or not Fraction(term[1]):
            raise DataError(
                f"{where}: not a sum of datasets by weight; got {text!r}, expected a weight above "
                "0 and a dataset, as in '0.7 /data/imagenet + 0.3 /data/web'. Correct the term."
            )
        name = term[2] or term[3].rstrip("/").rpartition("/")[2]
        if name in terms:
            raise DataError(
                f"{where}: two datasets with the same name; got {name!r} twice, expected "
                f"different names. Give one a name: '{term[1]} NAME={term[3]}'."
            )
        terms[name] = term[3].strip(), Fraction(term[1])
    scale = math.lcm(*(weight.denominator for _, weight in terms.values()))
    shares = [int(weight * scale) for _, weight in terms.values()]
    divisor = math.gcd(*shares)
    if sum(shares) // divisor > MAX_PERIOD:
        raise DataError(
            f"{where}: weights with too many digits; got {root!r}, expected a ratio of whole "
            f"numbers that add up to at most {MAX_PERIOD:,}. Round the weights."
        )
    return tuple(
        WeightedRoot(name, path, share // divisor)
        for (name, (path, _)), share in zip(terms.items(), shares, strict=True)
    )


def require_dataset(root: str, *, where: str) -> None:
    """Checks the form of a root, and takes a quick look at its file or folder.

    A path at which nothing exists is no error here.

    Raises:
        DataError: if the root is empty or malformed, a file is neither a tar file nor a parquet
            file, or a folder has no file in it or below it.
        ConfigError: if the root names a Python file and an object in it without `module:` in front.
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
        require_builtin(root, where)
        return
    kind = local_kind(root, where=where)
    if kind == "file":
        _require_archive(root, where)
    elif kind == "folder":
        _require_file_in(root, where)
    elif kind is None and doors.SCHEME.match(root):
        doors.refuse_scheme(root, _SCHEMES, where=where, of=DataError)


def require_builtin(root: str, where: str) -> None:
    """Raises DataError, with the nearest name, if no built-in dataset is called `root`."""
    known = keys_of("data/photographs.py", "SETS")
    if root not in known:
        raise DataError(
            f"{where}: unknown built-in dataset; got {root!r}, {nearest(root, known)}. Set "
            f"--{where} to one of these or to a folder."
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
            return  # An archive without members, which is reported when it is indexed.
        except OSError as error:
            raise unusable(where, error, root, of=DataError) from error
        except (tarfile.HeaderError, ValueError, OverflowError):
            wrong = "a file that is not a tar archive in spite of its name"
    raise DataError(f"{where}: {wrong}; got {root!r}, expected {_FORMS}. Set --{where} FOLDER.")


def _require_file_in(root: str, where: str) -> None:
    """Raises DataError if neither the folder `root` nor a folder below it has a file.

    Files whose names start with a dot do not count. The search stops at the first such file, so
    that only a few names of a large folder are listed. It also stops, without an error, after
    `_MOST_FOLDERS` folders and at a folder that cannot be listed.
    """
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
            return  # The listing reports the reason.
