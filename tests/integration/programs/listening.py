"""Runs commands of fd_large one after another, and notes every TCP socket that listens meanwhile.

listening.py FOLDER JSON, where JSON is a list of the commands' arguments.
"""

import json
import sys
import threading

import sockets
from launch import write_result

from fd_large.cli import main as cli

folder, commands = sys.argv[1], json.loads(sys.argv[2])
seen: set[tuple[str, int]] = set()
over = threading.Event()


def look() -> None:
    """Looks often: a socket that is closed within milliseconds is missed."""
    while not over.wait(0.01):
        seen.update(sockets.listening())


def close() -> None:
    """As a process's last look, the group still there."""
    seen.update(sockets.listening())


thread = threading.Thread(target=look, daemon=True)
thread.start()
codes = []
for command in commands:
    codes.append(cli.main(command))
    close()
over.set()
thread.join()
write_result(folder, {"codes": codes, "listened": sorted(seen)})
