"""Rank program: many steps by the trainer itself; memory after each tenth of them.

many_steps.py STEPS PICTURES FOLDER writes, per rank, the bytes of all tensors alive, the resident
size and the last learning rate. Loader, hooks, checkpoints and evaluation are those of any run.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path

from launch import ROOT, write_result
from scenarios import tiny_run
from tensor_storages import storages

from fd_large.cli.ownership import owning
from fd_large.engine.run import train
from fd_large.runtime.hooks import Hook, Update
from fd_large.tasks.jobs import job_of


def resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


class Memory(Hook):
    """Notes what is held after each `every` steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.rows: list[dict[str, float]] = []

    def after_update(self, update: Update) -> None:
        if (update.index + 1) % self.every == 0:
            row = {"tensors": sum(storages().values()), "resident": resident()}
            self.rows.append({**row, "rate": update.learning_rate})


def main(steps: int, pictures: str, folder: Path) -> None:
    shape = {
        "embed_dim": 8,
        "depths": (1,),
        "num_heads": (1,),
        "window_size": 2,
        "extra_norm_every": 1,
    }
    run = tiny_run(
        student={"architecture": shape},
        teacher={"architecture": shape},
        data={"root": pictures, "image_size": 16, "workers": 1},
        batch={"global_batch_size": 4, "micro_batch_size": 2},
        runtime={"run_dir": str(folder / "run"), "log_every": 50, "save_every": steps // 4},
        eval={"root": pictures, "every": steps // 5, "views": 4},
    )
    run = replace(run, optim=replace(run.optim, max_steps=steps))
    memory = Memory(steps // 10)
    with owning(run.run_dir()) as lease:
        train(
            run,
            job_of,
            deepspeed_config=str(ROOT / "ds_configs/zero3.json"),
            lease=lease,
            hooks=[memory],
        )
    write_result(folder, memory.rows)


if __name__ == "__main__":
    main(int(sys.argv[-3]), sys.argv[-2], Path(sys.argv[-1]))
