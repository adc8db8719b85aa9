"""Meets the other ranks, says so, and waits for the file "go"; then says what it heard of failures.

same_port.py FOLDER
"""

import sys
import time
from pathlib import Path

from launch import write_result

from fd_large.cli import main as cli
from fd_large.cli import train
from fd_large.ranks import distributed, failures


def wait(arguments: list[str]) -> int:
    """Stands in for the training of a run."""
    folder = Path(arguments[0])
    distributed.start()
    folder.mkdir(exist_ok=True)
    write_result(folder, "met")
    while not (folder / "go").exists():
        time.sleep(0.05)
    heard = failures.heard()
    distributed.barrier()
    write_result(folder, heard)
    return distributed.leave(0)


train.main = wait
sys.exit(cli.main(["train", sys.argv[1]]))
