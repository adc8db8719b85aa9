"""Rank program: steps on kernels in Triton's interpreter; one turns wrong on the last rank.

checked_kernels.py FOLDER. The losses of two steps, of one after the check, and what the check gave
up are written.
"""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path

from launch import write_result
from scenarios import start_engine, take_step, tiny_run

from fd_large.engine.counting.count import check_kernels
from fd_large.engine.zero import start
from fd_large.kernels import choose, window_attention_launch
from fd_large.ranks import distributed
from fd_large.tasks.distillation.job import DistillationJob


def main(folder: Path) -> None:
    """Takes two steps, makes a kernel wrong, checks all, and takes another step."""
    distributed.start()
    start.start()
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    logging.getLogger("fd_large.kernels").setLevel(logging.DEBUG)
    given = json.loads((folder / "scenarios.json").read_text())
    run = tiny_run(**given["run"])
    engine, _ = start_engine(run, given["zero"])
    engine.task.train()
    losses = [take_step(engine, run, update) for update in range(2)]
    right = window_attention_launch.launch
    if distributed.rank() == distributed.world_size() - 1:

        def wrong(kernel, grid, *arguments, **constants):
            if kernel == "window_attention_triton._forward":
                qkv, bias, table, scale, *rest = arguments
                arguments = (qkv, bias, table, scale * 1.03, *rest)
            right(kernel, grid, *arguments, **constants)

        window_attention_launch.launch = wrong
    check_kernels(DistillationJob(run), bfloat16=False)
    losses.append(take_step(engine, run, 2))
    result = {"refused": dict(choose.refused()), "losses": losses}
    write_result(folder, result)
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
