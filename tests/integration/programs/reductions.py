"""Meets the other ranks, runs every small collective once, and writes what came out."""

import dataclasses
import os
import resource
import sys
from pathlib import Path

import torch
from launch import write_result
from sockets import listening

from fd_large.ranks import distributed
from fd_large.ranks.launch import find_launch


def sockets() -> int:
    links = [os.readlink(path) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
    return sum(link.startswith("socket:") for link in links)


# mpirun hands its own to its children.
inherited = set(listening())
folder = sys.argv[-1]  # the deepspeed launcher puts --local_rank first
_, hard_limit = resource.getrlimit(resource.RLIMIT_NOFILE)
resource.setrlimit(resource.RLIMIT_NOFILE, (256, hard_limit))
launch = distributed.start()
rank, world_size = distributed.rank(), distributed.world_size()
ones = torch.full((3,), float(rank), dtype=torch.bfloat16)
made = []
new_group = torch.distributed.new_group
torch.distributed.new_group = lambda ranks, **how: made.append(ranks) or new_group(ranks, **how)
group = distributed.node_group(1)
before = sockets()
unused = [new_group(range(world_size)) for _ in range(10)]
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
    "broadcast": distributed.broadcast_object({"from": rank}),
    "gather": distributed.gather_objects("r" * rank),
    "group": torch.distributed.get_process_group_ranks(group),
    "group_again": distributed.node_group(1) is group,
    "groups_made": made,
    "sockets_of_an_unused_group": (sockets() - before) // len(unused),
    "listens_on": sorted({address for address, _ in set(listening()) - inherited}),
    "open_files": resource.getrlimit(resource.RLIMIT_NOFILE) == (hard_limit, hard_limit),
}
distributed.barrier()
distributed.stop()
result["stopped"] = [distributed.rank(), distributed.world_size()]
write_result(folder, result)
