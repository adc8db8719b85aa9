"""Runs what is in `triton_*.py`: tests of the Triton kernels, here in Triton's interpreter.

The interpreter is chosen by the environment when a kernel's module is imported, hence processes of
their own. On a GPU the same files run as they are: `pytest -m '' tests/unit/kernels/triton_*.py`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")
HERE = Path(__file__).resolve().parent

# The attention takes as long as all others; its sweep is in two, so that two processes share it.
ATTENTION = "triton_window_attention"
OTHERS = [path.stem for path in sorted(HERE.glob("triton_*.py")) if path.stem != ATTENTION]


@pytest.mark.parametrize(
    ("files", "only", "marked"),
    [
        pytest.param([ATTENTION], "", "not sweep", id="attention"),
        pytest.param(OTHERS, "", "not sweep", id="others"),
        *(
            pytest.param([ATTENTION], only, "sweep", marks=pytest.mark.sweep, id=f"sweep, {only}")
            for only in ("every_class", "not every_class")
        ),
        pytest.param(OTHERS, "", "sweep", marks=pytest.mark.sweep, id="sweep, others"),
    ],
)
def test_in_the_interpreter(files, only, marked):
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "FD_KERNELS": "triton",
        "OMP_NUM_THREADS": "1",
        # The interpreter wants none.
        "CUDA_VISIBLE_DEVICES": "",
    }
    paths = [str(HERE / f"{name}.py") for name in files]
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-x"]
    done = subprocess.run(
        [*command, "-m", marked, "-k", only, *paths],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    # A file whose every test was skipped shows nothing.
    assert " passed" in done.stdout
    assert "skipped" not in done.stdout, done.stdout[-2000:]
