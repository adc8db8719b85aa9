"""What `plan --probe` starts: the ranks that measure this machine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from fd_large import doors
from fd_large.errors import LaunchError
from fd_large.plan.rates import Rates
from fd_large.recipes.run import Run


def probe(run: Run, *, ranks: int) -> Rates:
    """Measures with as many local ranks as the run is to have.

    Args:
        run: The recipe, a micro-batch of which is timed.
        ranks: Number of processes; on GPUs at most the number of GPUs.

    Raises: LaunchError: if a rank fails.
    """
    import torch

    ranks = min(ranks, torch.cuda.device_count() or ranks)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rates.json"
        code = {name: digest for name, digest in run.code().items() if doors.is_allowed(name)}
        request = json.dumps({"run": run.to_dict(), "out": str(out), "code": code})
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        launcher = ["torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
        done = subprocess.run(
            [sys.executable, "-m", *launcher, "--module", "fd_large.cli.plan_probe", request],
            env=os.environ | {"OMP_NUM_THREADS": str(threads)},
            check=False,
        )
        if done.returncode:
            raise LaunchError(
                f"--probe: a rank failed; got exit code {done.returncode}, expected 0. Read its "
                "message above."
            )
        return Rates(**json.loads(out.read_text()))


def main(request: str) -> None:
    """Runs one of the ranks that `probe` starts."""
    import torch
    import torch.distributed as dist

    from fd_large.engine.probe import MOST_IMAGES, measure
    from fd_large.tasks.jobs import job_of

    asked: dict[str, Any] = json.loads(request)
    doors.allow_unchanged(asked["code"])
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo")
    rank = dist.get_rank()
    run = Run.from_dict(asked["run"])
    size = run.batch.micro_batch_size
    rates = measure(job_of(run), micro_batch_size=MOST_IMAGES if size == "auto" else size)
    dist.destroy_process_group()
    if rank == 0:
        Path(asked["out"]).write_text(json.dumps(rates))


if __name__ == "__main__":
    main(sys.argv[1])
