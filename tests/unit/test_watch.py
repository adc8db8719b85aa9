"""The eyes of the watch; `test_launchers.py` lets real ranks be orphaned."""

from __future__ import annotations

import dataclasses
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
def test_a_process_is_running_until_it_ends_and_is_told_from_a_later_one() -> None:
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as child:
        process = watch._Process.read(child.pid)
        assert process is not None
        assert process.parent == os.getpid()
        assert process.is_running()
        assert not dataclasses.replace(process, start_time=process.start_time - 1).is_running()
        child.kill()
        os.waitid(os.P_PID, child.pid, os.WEXITED | os.WNOWAIT)
        assert not process.is_running()  # a zombie
    assert not process.is_running()
