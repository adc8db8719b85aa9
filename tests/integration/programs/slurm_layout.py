"""Stands in for train.py: where this rank is and what it sees, then a meeting of all by sockets."""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from dataclasses import asdict
from pathlib import Path

from fd_large.ranks.launch import Launch, find_launch


def meet(launch: Launch, seconds: float = 60.0) -> list[int]:
    """The ranks that rank 0 heard of at the meeting place, on rank 0; the others wait for it."""
    place = (launch.master_addr, launch.master_port)
    if launch.rank == 0:
        heard, open_ones = [0], []
        with socket.create_server(place, backlog=launch.world_size) as server:
            server.settimeout(seconds)
            while len(heard) < launch.world_size:
                connection, _ = server.accept()
                heard.append(int(connection.recv(16)))
                open_ones.append(connection)
        for connection in open_ones:
            connection.sendall(b"go")
        return sorted(heard)
    deadline = time.monotonic() + seconds
    while True:
        try:
            connection = socket.create_connection(place, seconds)
            break
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.1)
    with connection:
        connection.settimeout(seconds)
        connection.sendall(str(launch.rank).encode())
        assert connection.recv(2) == b"go"
    return []


def main(folder: str) -> None:
    """Writes what it found to FOLDER/rank_R.json."""
    launch = find_launch()
    found = asdict(launch) | {
        "node": os.environ["SLURMD_NODENAME"],
        "devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "cores": os.environ.get("SLURM_CPUS_PER_TASK"),
        "words": sys.argv[2:],
        "heard": meet(launch),
    }
    Path(folder, f"rank_{launch.rank}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1])
