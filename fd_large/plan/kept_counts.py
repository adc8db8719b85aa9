"""Reads and writes the file of counts of named recipes, so that a plan for them needs no torch.

`benchmarks/keep_counts.py` writes the file anew when a recipe or a model changes, and a test
compares the file with new counts.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

from fd_large.files import read_json
from fd_large.plan.counts import Counts

FILE = Path(__file__).with_name("kept_counts.json")


def key(fields: Mapping[str, Any], capability: str, kernels: str) -> str:
    """Returns the key under which the counts of a recipe on a kind of GPU are stored.

    Args:
        fields: Fields of the recipe that determine the shapes in a step and differ from the
            defaults, by name.
        capability: Compute capability of the GPU, such as "9.0".
        kernels: "fused" or "reference".
    """
    text = json.dumps([sorted(fields.items()), capability, kernels])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read(name: str) -> dict[bool, Counts] | None:
    """Looks up the stored counts of the key `name` (see `key`).

    Returns: a dict of the counts without activation checkpointing (False) and with it (True), or
        None if the file does not have the key.
    """
    table = _kept()
    if name not in table["keys"]:
        return None
    pair = table["counts"][table["keys"][name]]
    return {bool(i): Counts.from_plain(plain) for i, plain in enumerate(pair)}


@cache
def _kept() -> dict[str, Any]:
    """Returns the contents of the file, which are cached since a plan may need hundreds of keys."""
    return read_json(FILE)


def write(counts: Mapping[str, Mapping[bool, Counts]], path: Path = FILE) -> None:
    """Writes the file of counts, in which equal counts are stored once.

    Args:
        counts: For each key, the counts without activation checkpointing (False) and with it
            (True).
        path: The file.
    """
    different: list[str] = []
    keys = {}
    for name, both in counts.items():
        text = json.dumps([both[wrapped].to_plain() for wrapped in (False, True)])
        if text not in different:
            different.append(text)
        keys[name] = different.index(text)
    lines = ",\n".join(text.replace(" ", "") for text in different)
    path.write_text(f'{{"keys": {json.dumps(keys)},\n"counts": [\n{lines}\n]}}\n')
