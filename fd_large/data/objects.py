"""Finds files by path or URL, and reads files of object stores and web servers in byte ranges.

fsspec connects to object stores and web servers. If a store is busy, slow or unreachable, requests
are repeated after growing pauses (`asked`). If the store does not recover, the run ends with the
exit code of a resumable run. No response stays open between two requests, and fsspec makes a new
client in a forked process.
"""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, BinaryIO, NamedTuple, TypeVar

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem
from fsspec.spec import AbstractBufferedFile

from fd_large.data.roots import (
    GLOB,
    PARQUET,
    check_packages,
    expand_braces,
    is_url,
    local_kind,
    name_of,
    scheme_of,
)
from fd_large.errors import DataError, named
from fd_large.files import PASSING, retried, unusable
from fd_large.ranks import meeting

T = TypeVar("T")

# Seconds after which a request without an answer is given up and made again.
ANSWER_SECONDS = 60.0
# Bytes of one request: enough to fill a connection, few enough to repeat after a failure.
RANGE_BYTES = 16 << 20
# Number of simultaneous requests while a dataset is opened.
STREAMS = 16
READ_REMOTELY = (".tar", PARQUET)

_BUSY = {408, 425, 429}
# A forked process must keep the clients that it inherits. Closing their connections would remove
# them from the epoll that it shares with its parent, which would then wait for answers in vain.
_clients: dict[int, Any] = {}
_BROKEN = {
    "ConnectionError",  # A name of both Python's and botocore's.
    "HTTPClientError",
    "IncompleteReadError",
    "ResponseParserError",
    "ClientConnectionError",  # This and the next are of aiohttp.
    "ClientPayloadError",
}


class Stored(NamedTuple):
    """A local file or an object in a store, as it was when the dataset was listed.

    Attributes:
        url: Path or URL.
        size: Size in bytes.
        stamp: Text that changes with the contents: the ETag of an object, or the modification time
            of a file; "" if unknown.
    """

    url: str
    size: int
    stamp: str

    @property
    def is_remote(self) -> bool:
        """Whether the object is in a remote store."""
        return is_url(self.url)

    def open(self) -> BinaryIO:
        """Checks that the file is unchanged, and opens the file for reading.

        Raises:
            DataError: if the file has changed, or its size and stamp cannot be read.
            OSError: if a local file cannot be opened.
            StorageError: if the store of the file does not answer.
        """
        now = _looked_up(self.url)
        if now != self:
            raise DataError(
                f"{self.url}: changed since it was listed; got {now.size} bytes ({now.stamp}), "
                f"expected {self.size} ({self.stamp}). Restore the object, or start again to list "
                "the objects anew."
            )
        if self.is_remote:
            client, path = _client(self.url)
            return _Ranges(client, path, size=self.size, cache_type="none")
        return open(self.url, "rb")


def join(root: str, name: str) -> str:
    """Returns the path or URL of the file or folder `name` below `root`, a path or a URL."""
    return f"{root.rstrip('/')}/{name}" if is_url(root) else os.path.join(root, name)


def asked(url: str, action: Callable[[], T]) -> T:
    """Makes a request to a store, and repeats the request after transient failures.

    Args:
        url: URL for messages.
        action: Function that makes the request, and can be called repeatedly.

    Raises:
        StorageError: if transient failures go on.
        DataError: if the request fails in another way, such as by a refusal of the store.
    """

    def once() -> T:
        try:
            return action()
        except Exception as error:
            if _passes(error):
                raise OSError(errno.EREMOTEIO, named(error)) from error
            if isinstance(error, OSError) and not is_url(url):
                raise unusable("", error, url, of=DataError) from error
            raise DataError(
                f"{url}: cannot be read; got {named(error)}, expected an object that this user "
                "may read. Check the name, and the credentials that the store's client uses."
            ) from error

    return retried(once, url)


def find(root: str, endings: tuple[str, ...], where: str) -> list[Stored]:
    """Returns the files or objects of a root whose names have certain endings, sorted by name.

    With braces, the names are sorted for each expanded pattern. The result is empty if there is no
    such file.

    Args:
        root: Path or URL of a file or a folder, or a pattern with "{00..12}" or "*". A folder is
            searched with its subfolders, without names that start with a dot.
        endings: Endings of names, in lower case.
        where: Name of the configuration field that holds the root, for messages.

    Raises: DataError: if a named file is missing, or a needed package is not installed.
    """
    check_packages(root, where=where)
    try:
        names = [name for pattern in expand_braces(root) for name in _names(pattern, endings)]
        with ThreadPoolExecutor(STREAMS) as pool:
            return list(pool.map(_looked_up, dict.fromkeys(names)))
    except DataError as error:
        raise DataError(f"{where}: {error}") from error


def find_objects(root: str, where: str) -> list[Stored]:
    """Returns the tar shards or the parquet files at a URL, which one rank finds for all ranks.

    Raises: DataError: as `find`, or if both kinds are at the URL.
    """
    objects = meeting.once(f"objects of {root}", lambda: find(root, READ_REMOTELY, where))
    kinds = {os.path.splitext(name_of(stored.url).lower())[1] for stored in objects}
    if len(kinds) > 1:
        raise DataError(
            f"{where}: tar shards and parquet files in one place; got both below {root!r}, "
            f"expected one kind. Set --{where} '{root.rstrip('/')}/*.parquet' or '*.tar'."
        )
    return objects


def fingerprint_of(files: Sequence[Stored], facts: Iterable[str]) -> str:
    """Returns a hash of the files' names below their common folder, and of a text for each file.

    Such a text is, for example, the file's size and modification time.
    """
    folder = os.path.commonpath([os.path.dirname(name_of(file.url)) for file in files])
    digest = hashlib.sha256()
    for file, fact in zip(files, facts, strict=True):
        name = name_of(file.url)[len(folder) :]
        digest.update(f"{name}\0{fact}\0".encode("utf-8", "replace"))
    return digest.hexdigest()


def _names(root: str, endings: tuple[str, ...]) -> Iterator[str]:
    client, path = _client(root)
    kind = local_kind(root)  # None for a URL, too.
    if not kind and GLOB.search(name_of(path)):
        names = asked(root, lambda: client.glob(path))
    elif kind != "folder" and name_of(path).lower().endswith(endings):
        names = [path]
    else:
        names = asked(root, lambda: client.find(path))
    below = len(path.rstrip("/"))
    for name in sorted(names):
        if name_of(name).lower().endswith(endings) and "/." not in name[below:]:
            yield client.unstrip_protocol(name) if is_url(root) else name


def _looked_up(url: str) -> Stored:
    client, path = _client(url)
    facts = asked(url, lambda: client.info(path))
    if facts.get("type", "file") != "file":  # A named pipe would wait for a writer.
        raise DataError(
            f"not a file; got {url!r}, a folder, a pipe or a device, expected a file that can be "
            "read. Leave this object out, or correct the name."
        )
    if facts.get("size") is None:
        raise DataError(
            f"{url}: the server does not report the size of this file; got no size, expected a "
            "number of bytes. Download the file, or use another server."
        )
    stamps = (facts.get(name) for name in ("ETag", "etag", "md5Hash", "mtime", "LastModified"))
    return Stored(url, int(facts["size"]), str(next(filter(None, stamps), "")).strip('"'))


class _Ranges(AbstractBufferedFile):
    """An object in a store, opened as a file whose reads are requests of byte ranges.

    A request has at most `RANGE_BYTES` bytes, and is repeated after transient failures.
    """

    def _fetch_range(self, start: int, end: int) -> bytes:
        def get(start: int, end: int) -> bytes:
            content: bytes = self.fs.cat_file(self.path, start=start, end=end)
            if len(content) != end - start:
                raise ConnectionError(f"{len(content)} of {end - start} bytes")
            return content

        end = min(end, self.size)
        starts = range(start, end, RANGE_BYTES)
        ranges = [(place, min(place + RANGE_BYTES, end)) for place in starts]
        return b"".join(asked(self.full_name, partial(get, *bounds)) for bounds in ranges)


def _client(url: str) -> tuple[Any, str]:
    """Returns fsspec's file system for a path or URL, and the path within this file system.

    A forked process gets a file system of its own for a URL.
    """
    if not is_url(url):  # In a path, fsspec would give `A::B` and `~` a special meaning.
        return LocalFileSystem(), os.path.abspath(url)
    scheme, options = scheme_of(url), {}
    # `asked` makes the retries; retries of the clients would multiply them.
    if scheme in ("s3", "s3a"):
        options["config_kwargs"] = {
            "connect_timeout": ANSWER_SECONDS,
            "read_timeout": ANSWER_SECONDS,
            "retries": {"total_max_attempts": 1, "mode": "standard"},
        }
    elif scheme in ("http", "https"):
        import aiohttp

        options["client_kwargs"] = {
            "timeout": aiohttp.ClientTimeout(
                total=None, sock_connect=ANSWER_SECONDS, sock_read=ANSWER_SECONDS
            )
        }
    client, path = url_to_fs(url, use_listings_cache=False, **options)
    if scheme in ("s3", "s3a"):
        client.retries = 1
    _clients[id(client)] = client
    return client, path


def _passes(error: BaseException) -> bool:
    """Whether the error of a request to a store is transient.

    Transient are lost connections, timeouts, and answers that a server is busy or has failed.
    """
    # Errors of broken connections, by the names of the libraries' classes.
    kinds = {kind.__name__ for kind in type(error).__mro__}
    if kinds & _BROKEN:
        return True
    causes: Sequence[BaseException] = [error, *filter(None, [error.__cause__])]
    for cause in causes:
        status = getattr(cause, "status", None) or getattr(cause, "code", None)
        response = getattr(cause, "response", None)
        if isinstance(response, dict):  # The error is one of botocore.
            status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", status)
        if isinstance(status, int) and status >= 400:
            return status >= 500 or status in _BUSY
    if isinstance(error, (FileNotFoundError, PermissionError, ImportError)):
        return False
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno in PASSING
    return isinstance(error, (TimeoutError, EOFError))
