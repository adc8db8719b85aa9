"""Meets the other ranks, says so, and waits to be stopped: waits.py HANDLER FOLDER.

HANDLER is what SIGTERM finds: `default`, `deaf` (a handler that does nothing) or `saves` (one that
holds the rank past its grace).
"""

import os
import signal
import sys
import time
from pathlib import Path

from launch import write_result

from fd_large.ranks import distributed, processes

handler, folder = sys.argv[-2:]
saving = False


def note(_signal: int, _frame: object) -> None:
    global saving
    saving = handler == "saves"


if handler != "default":
    signal.signal(signal.SIGTERM, note)
    processes.ORPHAN_GRACE_SECONDS = 1.0
distributed.start()
write_result(folder, os.getpid())
while True:
    time.sleep(0.1)
    if saving:
        with processes.hold():
            time.sleep(3.0)
            (Path(folder) / f"saved_{distributed.rank()}").touch()
        saving = False
