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

FOLDER = Path(os.environ.get("FD_ORACLES", Path(__file__).resolve().parents[3] / "shared/oracles"))


def oracle(name: str) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """A published number's settings and tensors; skips the test where there are none."""
    if not FOLDER.is_dir():
        pytest.skip(f"no oracles at {FOLDER}; set FD_ORACLES to their folder")
    spec = json.loads((FOLDER / f"{name}.json").read_text())
    return spec, load_file(FOLDER / f"{name}.safetensors")


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
