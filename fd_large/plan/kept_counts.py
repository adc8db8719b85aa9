"""The shipped counts of named recipes, so that planning them needs no torch.

`benchmarks/keep_counts.py` writes the file again where a recipe or a model changes; a test compares
the file with new counts.
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
    """Returns the key of a count.

    Args:
        fields: Fields of the recipe that decide the shapes of a step and differ from the
            defaults, by name.
        capability: Compute capability of the card, as "9.0".
        kernels: "fused" or "reference".
    """
    text = json.dumps([sorted(fields.items()), capability, kernels])
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def read(name: str) -> dict[bool, Counts] | None:
    """Returns the counts of a key, without and with checkpoints, or None."""
    table = _kept()
    if name not in table["keys"]:
        return None
    pair = table["counts"][table["keys"][name]]
    return {bool(i): Counts.from_plain(plain) for i, plain in enumerate(pair)}


@cache
def _kept() -> dict[str, Any]:
    """Returns the file's contents, cached for the hundreds of lookups of a transfer plan."""
    return read_json(FILE)


def write(counts: Mapping[str, Mapping[bool, Counts]], path: Path = FILE) -> None:
    """Writes counts by key, and equal counts once."""
    different: list[str] = []
    keys = {}
    for name, both in counts.items():
        text = json.dumps([both[wrapped].to_plain() for wrapped in (False, True)])
        if text not in different:
            different.append(text)
        keys[name] = different.index(text)
    lines = ",\n".join(text.replace(" ", "") for text in different)
    path.write_text(f'{{"keys": {json.dumps(keys)},\n"counts": [\n{lines}\n]}}\n')
