"""The doctor on two ranks, each a node of its own; n2 lacks what it is told to lack."""

import os
import sys

rank = int(os.environ["RANK"])
os.environ |= {"LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1", "SLURMD_NODENAME": f"n{rank + 1}"}
if rank == 1:
    os.environ["NCCL_P2P_DISABLE"] = "1"

from fd_large.cli import main as cli  # noqa: E402 (after the variables that it reads)

sys.exit(cli.main(["doctor", "--run_dir", sys.argv[-1] if rank == 0 else "/proc/runs"]))
