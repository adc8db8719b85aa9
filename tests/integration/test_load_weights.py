"""Two ranks load a model of over 300M parameters: a rank's memory, beside the naive loader's."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.sweep
def test_a_rank_holds_its_share_and_one_tensor(tmp_path: Path) -> None:
    out = tmp_path / "load_weights.json"
    command = [sys.executable, str(ROOT / "benchmarks" / "load_weights.py")]
    command += ["--rounds", "1", "--files", "weights.pth", "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    print(done.stdout)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(out.read_text())
    assert found["parameters"] > 300e6
    assert found["same_masters"]
    ours, naive = (found["loads"][loader]["weights.pth"] for loader in ("fd_large", "naive"))
    # The whole float32 model, which the naive loader holds on every rank, is twice the bound.
    assert ours["peak_bytes"] < found["bound_bytes"] < naive["peak_bytes"]
