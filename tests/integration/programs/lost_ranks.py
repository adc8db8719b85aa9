"""Three ranks, one of which is lost while nobody can notice by a collective.

lost_ranks.py HOW, where HOW is what becomes of rank 2: `mistake` it fails with exit code 2,
`killed` by SIGKILL. Rank 1 is stopped (SIGSTOP) and rank 0 waits for it in a collective of
the two, as ranks do in a kernel of NCCL. With `first` rank 0 is killed while the others wait for
something else.
"""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from fd_large.cli import main as cli
from fd_large.cli import train
from fd_large.errors import DataError
from fd_large.ranks import distributed
from fd_large.runtime import logs


def lost(arguments: list[str]) -> int:
    """Stands in for the training of a run."""
    rank = distributed.start().rank
    logs.start(rank)
    pair = dist.new_group([0, 1])
    distributed.barrier()
    if arguments == ["first"]:
        if rank == 0:
            time.sleep(1.0)
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(600)
    if rank == 1:
        os.kill(os.getpid(), signal.SIGSTOP)
    if rank == 0:
        print("waits", flush=True)
        dist.all_reduce(torch.zeros(1), group=pair)
    time.sleep(1.0)
    if arguments == ["killed"]:
        os.kill(os.getpid(), signal.SIGKILL)
    error = DataError("data.root: one image is damaged; got b, expected c. Mend it.")
    error.rank_local = True
    raise error


train.main = lost
sys.exit(cli.main(["train", sys.argv[1]]))
