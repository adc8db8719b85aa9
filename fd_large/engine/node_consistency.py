"""Checks, before models are built, that all nodes have the same code, packages, data, weights."""

from __future__ import annotations

import hashlib
import logging
import os
import platform
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch

import fd_large
from fd_large.data.source import ImageSource
from fd_large.errors import DataError, FDError, LaunchError, WeightsError, first_names
from fd_large.files import kind_of
from fd_large.ranks import distributed
from fd_large.runtime.run_folder import source_commit
from fd_large.weights.read import files_of
from fd_large.weights.resolve import Sources

log = logging.getLogger(__name__)

# Packages whose versions may change what is computed or decoded.
PACKAGES = ("torch", "deepspeed", "torchvision", "timm", "numpy", "triton")

_SAME_ENVIRONMENT = "Use one environment on a shared disk, or one image, on every node"
_BLOCK = 64 << 10
_BLOCKS = 64


class Fact(NamedTuple):
    """A property that must be the same on all nodes.

    Attributes:
        value: This node's value, in words.
        what: The field or subject, and what is wrong if it differs; begins the message.
        remedy: Advice for making the nodes equal; ends the message.
        error: Class of the error, or None if a difference is only logged.
    """

    value: str
    what: str
    remedy: str
    error: type[FDError] | None


_NodeFacts = tuple[str, Mapping[str, Fact]]
"""Name of a rank's node, and the rank's facts by name."""


def check(
    samples: ImageSource,
    sources: Mapping[str, str],
    weights: Sources,
    code: Mapping[str, str] | None = None,
) -> None:
    """Compares code, packages, images and weights of all nodes; all ranks must call this function.

    Args:
        samples: The training images.
        sources: Sources of weights, found on every rank, by the field that names them.
        weights: Locates the files of these sources.
        code: Hashes of the user's own files, by the names in the recipe; None for no files.

    Raises:
        LaunchError, DataError or WeightsError: If nodes differ from the majority; the message names
            these nodes.
    """
    facts = distributed.together(lambda: _facts(samples, sources, weights))
    for source, digest in (code or {}).items():
        facts[source] = Fact(
            f"the hash {digest[:8]}",
            f"{source}: the nodes see different files",
            "Copy the file to every node, or keep it on a shared disk",
            LaunchError,
        )
    compare(distributed.gather_objects((distributed.node_name(), facts)))


def software() -> dict[str, Fact]:
    """Returns fd_large's commit and hash, and the versions of Python and packages, as facts."""
    commit = source_commit()
    code = f"{commit[:9] if commit else 'no commit'}, the files' hash {code_hash()[:8]}"
    same_code = "Use one checkout on a shared disk, or one image, on every node"
    facts = {"code": Fact(code, "nodes: different code of fd_large", same_code, LaunchError)}
    versions = {"Python": platform.python_version()} | {name: _version(name) for name in PACKAGES}
    for name, number in versions.items():
        problem = f"nodes: different versions of {name}"
        facts[name] = Fact(number, problem, _SAME_ENVIRONMENT, LaunchError)
    return facts


def hardware(device: torch.device) -> dict[str, Fact]:
    """Returns this rank's GPU model and its versions of CUDA, NCCL and driver as facts, by name.

    Kernels are chosen by these facts. Without a GPU, the only fact is that there is none.
    """
    same_cards = (
        "Use nodes of one kind (sbatch --constraint), or exclude the other nodes (--exclude)"
    )
    if device.type != "cuda":
        return {"card": Fact("no GPU", "ranks: different GPUs", same_cards, LaunchError)}
    memory = round(torch.cuda.get_device_properties(device).total_memory / 1e9)
    card = f"{torch.cuda.get_device_name(device)}, {memory} GB"
    nccl = ".".join(map(str, torch.cuda.nccl.version()))
    facts = {
        "card": Fact(card, "ranks: different GPUs", same_cards, LaunchError),
        "CUDA": Fact(
            str(torch.version.cuda or torch.version.hip),
            "nodes: torch for different versions of CUDA",
            _SAME_ENVIRONMENT,
            LaunchError,
        ),
        "NCCL": Fact(nccl, "nodes: different versions of NCCL", _SAME_ENVIRONMENT, LaunchError),
    }
    if driver := _driver():
        remedy = "If losses differ from those on nodes of one kind, the drivers may be the cause"
        facts["driver"] = Fact(driver, "nodes: different drivers", remedy, None)
    return facts


def compare(ranks: Sequence[_NodeFacts]) -> None:
    """Compares the facts of nodes; the majority's value counts as right.

    `ranks` has the node and facts of every rank, in rank order. A fact that a rank lacks is
    compared between the other ranks only.

    Raises: FDError: for the first difference that is an error; the message names the others too.
    """
    names = dict.fromkeys(name for _, facts in ranks for name in facts)
    odd = {name: difference for name in names if (difference := _odd(ranks, name))}
    if not odd:
        return
    facts_of = {name: next(facts[name] for _, facts in ranks if name in facts) for name in odd}
    stops = [name for name in odd if facts_of[name].error is not None]
    for name, (nodes, got, most, expected) in odd.items():
        fact = facts_of[name]
        also = f" (and different {', '.join(stops[1:])})" if stops[1:] and name == stops[0] else ""
        message = (
            f"{fact.what}; got {got} on {first_names(nodes)}{also}, expected {expected} as on "
            f"{most}. {fact.remedy}."
        )
        if fact.error is None:
            log.warning("%s", message)
        elif name == stops[0]:
            raise fact.error(message)


def code_hash() -> str:
    """Returns a hash of fd_large's own source files, whether or not they are committed."""
    root = Path(fd_large.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes() + b"\0")
    return digest.hexdigest()


def weights_digest(source: str, weights: Sources) -> str:
    """Returns the size of a source's files and a hash of samples of their bytes, in words.

    Returns "" if the source has no file, as for random weights and models of libraries. 4 MB of a
    file suffice, because two trainings of one model differ in all weights.

    Raises: WeightsError: if a file is missing or cannot be read.
    """
    located = weights.resolve(source).path if source not in ("", "random") else None
    if located is None:
        return ""
    digest, size = hashlib.sha256(), 0
    try:
        for path in _files(located):
            with open(path, "rb") as file:
                size += _sample(file.fileno(), digest.update)
    except OSError as error:
        raise WeightsError(
            f"weights: {source}: cannot be read; got {error.strerror or error}, expected a "
            "readable file. Correct its permissions, or fetch the file again."
        ) from error
    return f"{size} bytes, hash {digest.hexdigest()[:8]}"


def _facts(samples: ImageSource, sources: Mapping[str, str], weights: Sources) -> dict[str, Fact]:
    is_first = distributed.local_rank() == 0  # Ranks of a node see the same files.
    # The code first, which explains most other differences.
    facts = (software() if is_first else {}) | hardware(distributed.device())
    facts["images"] = Fact(
        f"{len(samples)} images, their names' hash {samples.fingerprint[:8]}",
        "data.root: the nodes see different images",
        "Copy the dataset to every node, and let nothing write to it",
        DataError,
    )
    for where, source in sources.items() if is_first else ():
        if digest := weights_digest(source, weights):
            facts[where] = Fact(
                digest,
                f"--{where}: the nodes see different weights in {source}",
                "Copy the file to every node again, or read it from a shared disk",
                WeightsError,
            )
    return facts


def _sample(descriptor: int, update: Callable[[bytes], object]) -> int:
    """Passes an open file's first and last bytes, blocks between them and its size to `update`.

    Returns the size of the file in bytes.
    """
    size = os.fstat(descriptor).st_size
    stride = max(_BLOCK, size // _BLOCKS)
    for at in (*range(0, size, stride), max(0, size - _BLOCK)):
        update(os.pread(descriptor, _BLOCK, at))
    update(str(size).encode())
    return size


def _files(path: Path) -> list[Path]:
    if kind_of(path / "manifest.json") == "file":
        # A checkpoint, whose tensors rank 0 alone reads.
        return [path / "manifest.json"]
    return files_of(path)


def _version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "none"


def _driver() -> str | None:
    try:
        text = Path("/proc/driver/nvidia/version").read_text()
    except OSError:
        return None
    match = re.search(r"\b\d{3}\.\d+[.\d]*", text)
    return match.group() if match else None


def _odd(ranks: Sequence[_NodeFacts], name: str) -> tuple[list[str], str, str, str] | None:
    """Compares a fact of all ranks that have it, at least one; returns None if these ranks agree.

    Otherwise returns the nodes that differ from the majority, the value of the first of these
    nodes, a node of the majority, and the majority's value. Of equally frequent values, that of the
    lowest rank counts as the majority's.
    """
    values = [(node, facts[name].value) for node, facts in ranks if name in facts]
    # Among equally frequent values the one of the lowest rank comes first.
    right, _ = Counter(value for _, value in values).most_common(1)[0]
    others = [(node, value) for node, value in values if value != right]
    if not others:
        return None
    most = next(node for node, value in values if value == right)
    return list(dict.fromkeys(node for node, _ in others)), others[0][1], most, right
