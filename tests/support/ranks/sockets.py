"""The TCP sockets at which this process and its threads listen, from /proc."""

from __future__ import annotations

import contextlib
import os
import socket
from pathlib import Path

LISTENS = "0A"


def listening() -> list[tuple[str, int]]:
    """Returns the (address, port) of every TCP socket of this process that listens."""
    inodes = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            inodes.add(os.readlink(f"/proc/self/fd/{name}"))
    found = []
    for family, table in ((socket.AF_INET, "tcp"), (socket.AF_INET6, "tcp6")):
        for line in Path(f"/proc/self/net/{table}").read_text().splitlines()[1:]:
            _, local, _, state, *more = line.split()
            if state == LISTENS and f"socket:[{more[5]}]" in inodes:
                words, port = local.split(":")
                # Each word of four bytes stands in the order of the processor.
                packed = b"".join(
                    bytes.fromhex(words[at : at + 8])[::-1] for at in range(0, len(words), 8)
                )
                found.append((socket.inet_ntop(family, packed), int(port, 16)))
    return sorted(found)
