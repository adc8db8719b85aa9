"""Is an all-reduce of gradients faster than a reduce to each owner? A part of gpu.sh.

    torchrun --nproc_per_node N benchmarks/gpu_collectives.py

At ZeRO-1 and 2, up to MOST_OWNERS ranks (fd_large/plan/buckets.py) reduce each part of a bucket to
the rank that updates this part. More ranks all-reduce the whole bucket.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fd_large.plan.buckets import MOST_OWNERS
from fd_large.ranks import distributed

ROUNDS = 10
BYTES, BYTES_ON_CPUS = 200_000_000, 2_000_000


def milliseconds(act: Callable[[], None]) -> float:
    """Returns the median time of the collective `act` on the slowest rank, in ms.

    Every rank has to call this function.
    """
    times = []
    for _ in range(ROUNDS + 2):
        distributed.barrier()
        begin = time.perf_counter()
        act()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(distributed.max_rank(time.perf_counter() - begin))
    return 1e3 * statistics.median(times[2:])


def main() -> None:
    """Prints the times of both ways, and whether `MOST_OWNERS` fits this number of ranks."""
    ranks = distributed.start().world_size
    size = BYTES if torch.cuda.is_available() else BYTES_ON_CPUS
    bucket = torch.ones(size // 2 // ranks * ranks, dtype=torch.bfloat16)
    bucket = bucket.to(distributed.device())
    parts = bucket.chunk(ranks)

    def to_owners() -> None:
        works = [dist.reduce(part, owner, async_op=True) for owner, part in enumerate(parts)]
        for work in works:
            work.wait()

    whole = milliseconds(lambda: dist.all_reduce(bucket))
    owners = milliseconds(to_owners)
    if distributed.is_main():
        print(
            f"{size / 1e6:.0f} MB, {ranks} ranks: all-reduce {whole:.2f} ms, to owners {owners:.2f}"
        )
        used, better = ranks <= MOST_OWNERS, owners < whole
        verdict = "right" if used == better else "WRONG"
        print(f"DECIDED: MOST_OWNERS = {MOST_OWNERS} is {verdict} for {ranks} ranks")
    distributed.stop()


if __name__ == "__main__":
    main()
