"""Rank program: what a rank holds while a student is built under zero.Init.

building.py FOLDER writes, per rank: the most bytes of whole parameters alive at any module's end,
the largest module's own bytes, and the bytes of the rank's partition.
"""

from __future__ import annotations

import sys
from pathlib import Path

from deepspeed.runtime.zero import partition_parameters
from launch import write_result
from torch import nn

from fd_large.backbones.registry import build
from fd_large.engine.zero import partition, start
from fd_large.ranks import distributed


def main(folder: Path) -> None:
    distributed.start()
    start.start()
    alive: list[nn.Module] = []
    largest_module = most_whole = 0
    original = partition_parameters.Init._post_init_method

    def watched(self: object, module: nn.Module) -> None:
        nonlocal largest_module, most_whole
        alive.append(module)
        own = sum(p.numel() * p.element_size() for p in module.parameters(recurse=False))
        largest_module = max(largest_module, own)
        # A partitioned parameter has no elements of its own; a whole one has all.
        whole = sum(
            p.numel() * p.element_size() for m in alive for p in m.parameters(recurse=False)
        )
        most_whole = max(most_whole, whole)
        original(self, module)

    partition_parameters.Init._post_init_method = watched
    config = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}
    net = partition.build(lambda: build("swinv2_tiny"), config, partitioned=True, seed=0)
    held = sum(p.ds_tensor.numel() * 4 for p in net.parameters())
    write_result(
        folder,
        {
            "modules": len(alive),
            "most_whole": most_whole,
            "largest_module": largest_module,
            "held": held,
            "all": 4 * sum(p.ds_numel for p in net.parameters()),
        },
    )
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
