"""Meets the other ranks, runs every small collective once, and writes what came out."""

import dataclasses
import os
import sys

import torch
from launch import write_result

from fd_large import distributed
from fd_large.launch import find_launch

folder = sys.argv[-1]  # the deepspeed launcher puts --local_rank first
launch = distributed.start()
rank, world_size = distributed.rank(), distributed.world_size()
ones = torch.full((3,), float(rank), dtype=torch.bfloat16)
group = distributed.node_group(1)
result = {
    "launch": dataclasses.asdict(launch),
    "again": distributed.start() is launch,
    # The environment that start wrote names the same launch to whoever asks next.
    "found_again": find_launch() == launch,
    "environment": {name: os.environ[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
    "rank": rank,
    "world_size": world_size,
    "is_main": distributed.is_main(),
    "device": str(distributed.device()),
    "sum": distributed.sum_tensor(ones).tolist(),
    "argument": ones.tolist(),
    "max": distributed.max_rank(rank),
    "any": [distributed.any_rank(rank == 1), distributed.any_rank(False)],
    "broadcast": distributed.broadcast_object({"from": rank}, source=world_size - 1),
    "gather": distributed.gather_objects("r" * rank),
    "group": torch.distributed.get_process_group_ranks(group),
    "group_again": distributed.node_group(1) is group,
}
distributed.barrier()
distributed.stop()
result["stopped"] = [distributed.rank(), distributed.world_size()]
write_result(folder, result)
