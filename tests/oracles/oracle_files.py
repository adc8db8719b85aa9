"""The published numbers' files, for tests that load them as a user does."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from oracles_models import max_relative
from safetensors.torch import load_file
from torch import Tensor

from fd_large.kernels.whitened_loss import whiten

FILES = Path(__file__).parent / "files"


def oracle_paths(*patterns: str) -> list[Path]:
    """JSON files of published numbers: those in this repository, then the others of FD_ORACLES."""
    folders = [FILES, *map(Path, filter(None, [os.environ.get("FD_ORACLES")]))]
    paths: dict[str, Path] = {}
    for folder in folders:
        for pattern in patterns:
            for path in sorted(folder.glob(f"{pattern}.json")):
                paths.setdefault(str(path.relative_to(folder)), path)
    return list(paths.values())


def oracle(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A published number's settings and tensors; skips the test where the file is not here."""
    for path in oracle_paths(name):
        return json.loads(path.read_text()), load_file(path.with_suffix(".safetensors"))
    pytest.skip(f"{name} is not in tests/oracles/files; set FD_ORACLES to a folder that has it")


def weights_of(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """An oracle's weights and buffers, by their published names."""
    kinds = ("weights.", "buffers.")
    return {n[8:]: t for kind in kinds for n, t in tensors.items() if n.startswith(kind)}


def assert_matches(net, spec, tensors, name, images=None) -> None:
    """A backbone's map of the oracle's images is the published one."""
    got = net(tensors["input"] if images is None else images).tokens
    if name == "out.whitened":
        got = whiten(got, 1e-5)
    assert max_relative(got, tensors[name]) <= spec["suggested_tolerance_max_rel"]
