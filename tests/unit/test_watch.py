"""The eyes of the watch; `test_launchers.py` lets real ranks be orphaned."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fd_large import watch


@pytest.mark.parametrize(
    ("command", "name"),
    [
        ("/v/bin/python3 /v/bin/deepspeed --num_gpus 8 train.py", "deepspeed"),
        ("/v/bin/python3 -u -m deepspeed.launcher.launch --x", "deepspeed.launcher.launch"),
        ("python -m torch.distributed.run train.py", "torch.distributed.run"),
        ("python -W ignore -X dev /v/bin/torchrun train.py", "torchrun"),
        ("/v/bin/mpirun -n 2 python train.py", "mpirun"),
        ("/v/bin/hydra_pmi_proxy --control-port vm:1", "hydra_pmi_proxy"),
        ("python train.py deepspeed", None),
        ("python -c mpirun", None),
        ("bash -c deepspeed train.py", None),
        ("vim deepspeed", None),
        ("python", None),
        ("", None),
    ],
)
def test_launchers_are_known_by_their_command_line(command: str, name: str | None) -> None:
    assert watch._launcher_name(command.split(" ")) == name


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs /proc")
def test_the_line_of_ancestors_changes_when_one_of_them_ends() -> None:
    assert next(watch._ancestors()) == os.getppid()
    # A process whose parent ends at once: its line is another one then.
    lines = (
        "import os, time; from fd_large import watch; above = list(watch._ancestors())\n"
        "read, write = os.pipe()\n"
        "if os.fork(): os.read(read, 1); os._exit(0)\n"
        "assert list(watch._ancestors())[1:] == above\n"
        "parent = os.getppid(); os.write(write, b'.')\n"
        "while os.getppid() == parent: time.sleep(0.01)\n"
        "print(next(watch._ancestors()) != parent)"
    )
    told = subprocess.run([sys.executable, "-c", lines], stdout=subprocess.PIPE, text=True)
    assert told.stdout == "True\n"
