"""Before anything heavy: all nodes run the same code on the same packages, data and weights."""

from __future__ import annotations

import hashlib
import json
import os
import platform
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import fd_large
from fd_large import distributed
from fd_large.data.source import ImageSource
from fd_large.errors import DataError, FDError, LaunchError, WeightsError
from fd_large.runtime.run_folder import source_commit
from fd_large.weights import package
from fd_large.weights.read import file_of, split_part
from fd_large.weights.source import MODULE, TIMM, locate

# Of these another version may compute, or decode, something else.
PACKAGES = ("torch", "deepspeed", "torchvision", "timm", "numpy")

_BLOCK = 64 << 10
_BLOCKS = 64
_NODES_NAMED = 8


class _Fact(NamedTuple):
    """Something that must be alike.

    Attributes:
        value: What a node has.
        what: Its place in the sentence.
        remedy: What makes it alike.
        error: The kind of mistake.
    """

    value: str
    what: str
    remedy: str
    error: type[FDError]


def check(samples: ImageSource, weights: Mapping[str, str]) -> None:
    """Compares all nodes; a collective.

    Args:
        samples: The training images.
        weights: Sources of weights, found on every rank, by the field that names them.

    Raises: LaunchError, DataError or WeightsError: naming the nodes that differ from most.
    """
    own = distributed.together(lambda: _facts(samples, weights))
    compare(distributed.gather_objects((distributed.node_name(), own)))


def software() -> dict[str, _Fact]:
    """What this process runs: the code by its content and commit, Python, and the packages."""
    commit = source_commit()
    code = f"{commit[:9] if commit else 'no commit'}, the files' hash {code_hash()[:8]}"
    alike = "Use one checkout on a shared disk, or one image, on every node"
    facts = {"code": _Fact(code, "nodes: other code of fd_large", alike, LaunchError)}
    versions = {"Python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    install = "Use one environment on a shared disk, or one image, on every node"
    for name, number in versions.items():
        facts[name] = _Fact(number, f"nodes: other versions of {name}", install, LaunchError)
    return facts


def compare(told: Sequence[tuple[str, Mapping[str, _Fact]]]) -> None:
    """Compares what nodes have; what most have counts as right.

    Args:
        told: Of every rank, in order: its node's name, and facts by name; a fact that a rank does
            not tell is not compared for it.

    Raises: FDError: of the first fact that is not alike, naming the others too.
    """
    names = dict.fromkeys(name for _, facts in told for name in facts)
    odd = {name: found for name in names if (found := _odd(told, name))}
    if not odd:
        return
    first = next(iter(odd))
    nodes, got, most = odd[first]
    fact = next(facts[first] for _, facts in told if first in facts)
    expected = next(facts[first].value for node, facts in told if node == most and first in facts)
    also = f" (and other {', '.join(list(odd)[1:])})" if len(odd) > 1 else ""
    raise fact.error(
        f"{fact.what}; got {got} on {_some(nodes)}{also}, expected {expected} as on {most}. "
        f"{fact.remedy}."
    )


def code_hash() -> str:
    """Hash of fd_large's own source files, whether or not they are committed."""
    root = Path(fd_large.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def weights_digest(source: str) -> str:
    """Size and a hash of samples of the file that a source means, or of its files; "" for none.

    Two trainings of one model differ everywhere, so that 4 MB of a file tell.

    Raises: WeightsError: if there is no such file, or it cannot be read.
    """
    if source in ("", "random") or source.startswith((TIMM, MODULE)):
        return ""
    name, _ = split_part(package.locate(locate(source).path))
    digest, size = hashlib.sha256(), 0
    try:
        for path in _files(Path(name)):
            with open(path, "rb") as file:
                size += _sample(file.fileno(), digest.update)
    except OSError as error:
        raise WeightsError(
            f"weights: {source}: cannot be read; got {error.strerror or error}, expected a file. "
            "Mend its permissions, or fetch it again."
        ) from error
    return f"{size} bytes, hash {digest.hexdigest()[:8]}"


# ------------------------------------------------------------------------------------------------


def _facts(samples: ImageSource, weights: Mapping[str, str]) -> dict[str, _Fact]:
    facts = software()
    facts["pictures"] = _Fact(
        f"{len(samples)} images, their names' hash {samples.fingerprint[:8]}",
        "data.root: the nodes see different images",
        "Copy the dataset to every node, and let nothing write to it",
        DataError,
    )
    if distributed.local_rank() != 0:
        return facts  # Ranks of a node see the same files.
    for where, source in weights.items():
        if digest := weights_digest(source):
            facts[where] = _Fact(
                digest,
                f"--{where}: the nodes see different weights in {source}",
                "Copy the file to every node again, or read it from a shared disk",
                WeightsError,
            )
    return facts


def _sample(descriptor: int, update: Callable[[bytes], object]) -> int:
    """Feeds the file's size, its first and last bytes and blocks in between; returns the size."""
    size = os.fstat(descriptor).st_size
    stride = max(_BLOCK, size // _BLOCKS)
    for at in (*range(0, size, stride), max(0, size - _BLOCK)):
        update(os.pread(descriptor, _BLOCK, at))
    update(str(size).encode())
    return size


def _files(path: Path) -> list[Path]:
    if (path / "manifest.json").is_file():
        # A checkpoint: the receipts hold what `settle` has checked its files against.
        return sorted(path.glob("*.json"))
    path = file_of(path)
    if path.suffix != ".json":
        return [path]
    names = json.loads(path.read_text())["weight_map"].values()
    return [path, *(path.parent / Path(name).name for name in sorted(set(names)))]


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _odd(
    told: Sequence[tuple[str, Mapping[str, _Fact]]], name: str
) -> tuple[list[str], str, str] | None:
    """Nodes whose fact is not that of most, what the first of them has, and a node of most."""
    values = [(node, facts[name].value) for node, facts in told if name in facts]
    # Of equally many the one of the lowest rank.
    right, _ = Counter(value for _, value in values).most_common(1)[0]
    others = [(node, value) for node, value in values if value != right]
    if not others:
        return None
    most = next(node for node, value in values if value == right)
    return list(dict.fromkeys(node for node, _ in others)), others[0][1], most


def _some(nodes: Sequence[str]) -> str:
    named = ", ".join(nodes[:_NODES_NAMED])
    more = len(nodes) - _NODES_NAMED
    return f"{named} and {more} more" if more > 0 else named
