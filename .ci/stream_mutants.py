"""Are mistakes in the order of streams noticed? Each of these, against the test that should see it.

    python .ci/stream_mutants.py [NAME ...]

A mistake is one line of the package, changed in a copy of the working tree: an event that is not
waited for, memory that is given back too early, a read or a copy that makes the host wait. Prints
"noticed" or "SURVIVED" for each; returns 1 if one survived. About ten minutes.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ASYNCHRONOUS = "tests/integration/test_asynchronous.py"
OWN_STREAM = "tests/unit/engine/test_own_stream.py"
WHOLE_BLOCKS = "tests/unit/engine/zero/test_whole_blocks.py"
PREFETCH = "tests/unit/engine/test_prefetch.py"
CUDA_CALLS, DEVICES = "tests/unit/test_cuda_calls.py", "tests/unit/test_devices.py"
ZERO = "fd_large/engine/zero"


class Mistake(NamedTuple):
    """One line that is changed, and the tests (a file, and words for -k) that should see it."""

    file: str
    before: str
    after: str
    tests: str
    words: str = ""


MISTAKES = {
    "a batch is not waited for": Mistake(
        "fd_large/engine/prefetch.py", "computing.wait_stream(self._stream)", "pass", PREFETCH
    ),
    "a batch is copied on the stream that computes": Mistake(
        "fd_large/engine/prefetch.py",
        "with torch.cuda.stream(self._stream):",
        "if True:",
        PREFETCH,
    ),
    "a teacher computes on the student's stream": Mistake(
        "fd_large/engine/own_stream.py", "with torch.cuda.stream(stream):", "if True:", OWN_STREAM
    ),
    "a teacher does not wait for its images": Mistake(
        "fd_large/engine/own_stream.py",
        "stream.wait_stream(torch.cuda.current_stream(device))",
        "pass",
        OWN_STREAM,
    ),
    "a teacher's maps are not waited for": Mistake(
        "fd_large/engine/own_stream.py", "reader.wait_stream(self._stream)", "pass", OWN_STREAM
    ),
    "a teacher's maps are not recorded": Mistake(
        "fd_large/engine/own_stream.py", "_tell(self._found, reader)", "pass", OWN_STREAM
    ),
    "a teacher is waited for at once": Mistake(
        "fd_large/engine/own_stream.py",
        "return _Awaited(found, stream, device)",
        "torch.cuda.current_stream(device).wait_stream(stream); return found",
        OWN_STREAM,
    ),
    "gradients are not kept until they are summed": Mistake(
        f"{ZERO}/stream_order.py",
        "            if parameter.grad is not None:",
        "            if parameter.grad is None:",
        ASYNCHRONOUS,
        "zero3",
    ),
    "flags are copied with a wait": Mistake(
        "fd_large/engine/loop.py",
        "flags = torch.tensor(own, dtype=torch.float64).to(device, non_blocking=True)",
        "flags = torch.tensor(own, dtype=torch.float64).to(device)",
        DEVICES,
        "reads_the_device_once",
    ),
    "a batch is copied with a wait": Mistake(
        "fd_large/data/loader.py",
        "tensor.to(device, non_blocking=True)",
        "tensor.to(device)",
        CUDA_CALLS,
        "pinned",
    ),
    "batches are not pinned": Mistake(
        "fd_large/data/loader.py",
        "pin_memory=torch.cuda.is_available()",
        "pin_memory=False",
        CUDA_CALLS,
        "pinned",
    ),
    "a checkpoint's memory is not pinned": Mistake(
        "fd_large/checkpoint/write.py",
        "pin_memory=pinned",
        "pin_memory=False",
        CUDA_CALLS,
        "checkpoint",
    ),
    "the event of hpZ's copies is never recorded": Mistake(
        f"{ZERO}/stream_order.py",
        "accelerator.current_stream().record_event()",
        "accelerator.Event()",
        ASYNCHRONOUS,
        "hpZ",
    ),
    "gathers wait before the optimiser writes": Mistake(
        f"{ZERO}/stream_order.py",
        "        plain(group)\n        gathers.wait_stream(accelerator.current_stream())",
        "        gathers.wait_stream(accelerator.current_stream())\n        plain(group)",
        ASYNCHRONOUS,
        "zero3",
    ),
    "a teacher's gathers do not wait for its weights": Mistake(
        "fd_large/tasks/distillation/teacher.py",
        "    order_gathers(engine)\n",
        "",
        ASYNCHRONOUS,
        "zero3",
    ),
    "a sum on its owner is not waited for": Mistake(
        f"{ZERO}/gradient_shards.py", "        work.wait()", "        pass", ASYNCHRONOUS, "zero2"
    ),
    "a stage's position MLP is gathered with its block": Mistake(
        f"{ZERO}/whole_blocks.py",
        "apart = {module for part in outside for module in part.modules()}",
        "outside, apart = [], set()",
        WHOLE_BLOCKS,
    ),
}


def is_noticed(root: Path, mistake: Mistake) -> bool:
    """Returns whether a test fails with the mistake in it."""
    file = root / mistake.file
    text = file.read_text()
    if text.count(mistake.before) != 1:
        sys.exit(f"{mistake.file}: not there once: {mistake.before!r}")
    file.write_text(text.replace(mistake.before, mistake.after))
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-m", "", "-p", "no:cacheprovider"]
    words = ["-k", mistake.words] if mistake.words else []
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run(
        [*command, mistake.tests, *words], cwd=root, env=environment, capture_output=True, text=True
    )
    file.write_text(text)
    if done.returncode not in (0, 1):
        sys.exit(f"{mistake.tests}: pytest ended with {done.returncode}\n{done.stdout[-2000:]}")
    return done.returncode == 1


def main(names: list[str]) -> int:
    """Prints what became of each mistake."""
    survived = 0
    with tempfile.TemporaryDirectory(prefix="mistakes_") as folder:
        root = Path(folder) / "tree"
        ignored = shutil.ignore_patterns(".git", ".venv", "__pycache__", "site")
        shutil.copytree(Path(), root, ignore=ignored)
        for name in names or MISTAKES:
            noticed = is_noticed(root, MISTAKES[name])
            survived += not noticed
            print("noticed " if noticed else "SURVIVED", name, flush=True)
    return int(survived > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
