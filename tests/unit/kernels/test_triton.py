"""Runs what is in `triton_*.py`: tests of the Triton kernels, here in Triton's interpreter.

The interpreter is chosen by the environment when a kernel's module is imported, hence processes of
their own. On a GPU the same files run as they are: `pytest tests/unit/kernels/triton_*.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).resolve().parent
ORACLES = Path(os.environ.get("FD_ORACLES", HERE.parents[3] / "shared/oracles"))


# The longest file in two, so that two processes share it.
HALVES = {"triton_window_attention": ("every_class", "not every_class")}
RUNS = [
    (path, half)
    for path in sorted(HERE.glob("triton_*.py"))
    for half in HALVES.get(path.stem, ("",))
]


@pytest.mark.parametrize(
    ("path", "half"), RUNS, ids=[f"{p.stem} {half}".strip() for p, half in RUNS]
)
def test_in_the_interpreter(path, half, tmp_path):
    if path.stem == "triton_oracles" and not ORACLES.is_dir():
        pytest.skip(f"no oracles at {ORACLES}; set FD_ORACLES to their folder")
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "FD_KERNELS": "triton",
        "OMP_NUM_THREADS": "1",
        # The interpreter wants none.
        "CUDA_VISIBLE_DEVICES": "",
    }
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-x",
        str(path),
        "-k",
        half,
    ]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    # A file whose every test was skipped shows nothing.
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout, done.stdout[-2000:]
