"""Rank program: a thousand updates of a tiny run; memory after each hundred.

thousand_steps.py FOLDER writes, per rank, the bytes of all tensors alive and the resident size.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from launch import write_result
from scenarios import ZERO3, images_of, start_engine, storages, tiny_run

from fd_large import distributed
from fd_large.data.loader import Batch
from fd_large.engine import start
from fd_large.engine.loop import forward_backward
from fd_large.recipes.architectures import Architecture


def resident() -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return int(line.split()[1]) * 1024
    raise AssertionError("no VmRSS")


def main(folder: Path) -> None:
    torch.set_num_threads(1)
    distributed.start()
    start.start()
    shape = Architecture(
        embed_dim=8, depths=(1,), num_heads=(1,), window_size=2, extra_norm_every=1
    )
    run = tiny_run(
        student={"architecture": shape},
        teacher={"architecture": shape},
        data={"image_size": 16},
        batch={"global_batch_size": 4, "micro_batch_size": 2},
    )
    engine, _ = start_engine(run, ZERO3)
    positions = torch.arange(2)
    images = images_of(0, run)[2 * distributed.rank() :][:2]
    rows = []
    for update in range(1000):
        loss = forward_backward(engine, Batch(images, 0, positions + 4 * update, positions), 0)
        engine.deepspeed.step()
        if update % 100 == 99:
            rows.append({"tensors": sum(storages().values()), "resident": resident()})
    write_result(folder, {"rows": rows, "loss": loss.item()})
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
