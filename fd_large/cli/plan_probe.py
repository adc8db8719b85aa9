"""What `plan --probe` starts: the ranks that measure this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import fd_large
from fd_large import doors
from fd_large.errors import LaunchError
from fd_large.files import parse_json, read_json
from fd_large.plan.phases import Phases
from fd_large.plan.rates import Rates
from fd_large.recipes.run import Run


def probe(runs: Sequence[Run], *, ranks: int) -> tuple[Rates, list[Phases | None]]:
    """Measures with as many local ranks as the run is to have.

    Args:
        runs: The recipe of each student, whose step is timed.
        ranks: Number of processes; on GPUs at most the number of GPUs.

    Returns: the machine's rates, and the phases of each recipe's step; None where that has no room.
    Raises: LaunchError: if a rank fails.
    """
    import torch

    ranks = min(ranks, torch.cuda.device_count() or ranks)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rates.json"
        code = {
            name: digest
            for run in runs
            for name, digest in run.code().items()
            if doors.is_allowed(name)
        }
        asked = {"runs": [run.to_dict() for run in runs], "out": str(out), "code": code}
        request = json.dumps(asked)
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        paths = (str(Path(fd_large.__file__).parents[1]), os.environ.get("PYTHONPATH"))
        done = subprocess.run(
            # -P, also of the ranks: a file of the working folder must not stand in for a module.
            [sys.executable, "-P", "-m", *launcher, "--module", "fd_large.cli.plan_probe", request],
            env=os.environ
            | {
                "OMP_NUM_THREADS": str(threads),
                "PYTHONSAFEPATH": "1",
                "PYTHONPATH": os.pathsep.join(filter(None, paths)),
            },
            check=False,
        )
        if done.returncode:
            raise LaunchError(
                f"--probe: a rank failed; got exit code {done.returncode}, expected 0. Read its "
                "message above."
            )
        found = read_json(out, where="--probe", holds=dict)
        phases = [one and Phases.from_plain(one, where="--probe") for one in found["phases"]]
        return Rates(**found["rates"]), phases


def main(request: str) -> None:
    """Runs one of the ranks that `probe` starts."""
    import torch
    import torch.distributed as dist

    from fd_large.engine import phases, probe
    from fd_large.tasks.jobs import job_of

    asked: dict[str, Any] = parse_json(request)
    doors.allow_unchanged(asked["code"])
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rates = probe.measure()
    # CPU ranks share the memory.
    share = 1 if on_gpu else dist.get_world_size()
    measured = [
        phases.measure(job_of(Run.from_dict(run)), free_bytes=probe.free_bytes() / share)
        for run in asked["runs"]
    ]
    if dist.get_rank() == 0:
        plain = [one.to_plain() if one else None for one in measured]
        Path(asked["out"]).write_text(json.dumps({"rates": rates, "phases": plain}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
