"""Measures the rates of this machine with local ranks, for `plan --probe`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from fd_large import doors
from fd_large.errors import LaunchError
from fd_large.files import parse_json, read_json
from fd_large.imports import environ_of_program
from fd_large.plan.phases import Phases
from fd_large.plan.rates import Rates
from fd_large.ranks.launch import LOOPBACK, Launch, free_port
from fd_large.recipes.run import Run


def probe(runs: Sequence[Run], *, ranks: int) -> tuple[Rates, list[Phases | None]]:
    """Measures this machine's rates and the steps of some recipes, with local ranks.

    Args:
        runs: The recipes, each with a single student, whose steps are timed.
        ranks: Number of ranks; on a machine with GPUs, at most the number of GPUs is used.

    Returns: the machine's rates; and for each recipe the times of the phases of its step, or None
        if the step does not fit in memory.

    Raises: LaunchError: if a rank fails.
    """
    import torch

    ranks = min(ranks, torch.cuda.device_count() or ranks)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "rates.json"
        named = {name: digest for run in runs for name, digest in run.code().items()}
        code = {name: digest for name, digest in named.items() if doors.is_allowed(name)}
        request = {"runs": [run.to_dict() for run in runs], "out": str(out), "code": code}
        threads = max(1, len(os.sched_getaffinity(0)) // ranks)
        environ = environ_of_program() | {"OMP_NUM_THREADS": str(threads)}
        program, port = [sys.executable, "-m", "fd_large.cli.plan_probe"], free_port()
        processes = [
            subprocess.Popen(
                [*program, *map(str, (rank, ranks, port))],
                env=environ,
                stdin=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        try:
            for process in processes:
                assert process.stdin is not None
                with suppress(BrokenPipeError):
                    process.stdin.write(json.dumps(request))
                    process.stdin.close()
            # Once a rank has failed, the others wait for it in vain, and are ended.
            while None in (codes := [process.poll() for process in processes]) and not any(codes):
                time.sleep(0.1)
        finally:
            for process in processes:
                process.kill()
                process.wait()
        if any(codes):
            raise LaunchError(
                f"--probe: a rank failed; got exit codes {', '.join(map(str, codes))}, expected 0. "
                "Read its message above."
            )
        measured = read_json(out, where="--probe", holds=dict)
        phases = [
            plain and Phases.from_plain(plain, where="--probe") for plain in measured["phases"]
        ]
        return Rates(**measured["rates"]), phases


def main(rank: int, ranks: int, port: int) -> None:
    """Runs one rank of `probe`, which reads its request as JSON from standard input.

    The ranks meet at `port` of this machine.
    """
    import torch

    from fd_large.engine.counting import phases, rates
    from fd_large.engine.memory import free_bytes
    from fd_large.ranks import distributed
    from fd_large.tasks.jobs import job_of

    request: dict[str, Any] = parse_json(sys.stdin.read())
    doors.allow_unchanged(request["code"])
    distributed.start(
        Launch(
            launcher="python",
            rank=rank,
            world_size=ranks,
            local_rank=rank,
            local_world_size=ranks,
            master_addr=LOOPBACK,
            master_port=port,
        )
    )
    measured_rates = rates.measure()
    # CPU ranks share the memory.
    share = 1 if torch.cuda.is_available() else ranks
    measured = [
        phases.measure(job_of(Run.from_dict(run)), free_bytes=free_bytes() / share)
        for run in request["runs"]
    ]
    if rank == 0:
        plain = [step_phases.to_plain() if step_phases else None for step_phases in measured]
        Path(request["out"]).write_text(json.dumps({"rates": measured_rates, "phases": plain}))
    distributed.barrier()
    distributed.stop()


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
