"""Whatever is summed in another order comes close: on each kind of kernels, by threads."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from launch import ROOT

# What torch's CPU kernels of that name need. torch takes the name from the environment unchecked.
FLAGS = {
    "default": set(),
    "avx2": {"avx2", "fma"},
    "avx512": {"avx512f", "avx512bw", "avx512dq", "avx512vl"},
}
SEEN = "import torch; print(torch.backends.cpu.get_cpu_capability(), torch.get_num_threads())"


@pytest.mark.sweep
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("capability", FLAGS)
def test_sums_in_another_order_come_close(capability: str, threads: int) -> None:
    listed = re.search(r"^flags\s*:(.*)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    missing = FLAGS[capability] - set(listed[1].split() if listed else ())
    if missing:
        pytest.skip(f"{capability}: this processor has no {', '.join(sorted(missing))}")
    # The ranks of another environment are forked from servers of their own.
    own = {name: value for name, value in os.environ.items() if "PYTEST" not in name}
    own |= {"ATEN_CPU_CAPABILITY": capability, "OMP_NUM_THREADS": str(threads)}
    # Threads that wait by spinning would take the cores of the other ranks.
    own |= {"OMP_WAIT_POLICY": "passive"}
    seen = subprocess.run([sys.executable, "-c", SEEN], env=own, capture_output=True, text=True)
    assert seen.stdout.lower().split() == [capability, str(threads)], seen.stderr
    words = [sys.executable, "-m", "pytest", "-m", "closeness and not sweep", "tests/integration"]
    done = subprocess.run(words, cwd=ROOT, env=own, capture_output=True, text=True, timeout=3600)
    assert done.returncode == 0, f"{capability}, {threads} threads:\n{done.stdout[-6000:]}"
