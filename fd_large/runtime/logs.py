"""Who speaks where: rank 0 on the console, every rank in its own file, libraries in files only."""

from __future__ import annotations

import logging
import sys
from pathlib import Path

from fd_large import distributed


def set_up(folder: Path) -> None:
    """Sends fd_large's log to the console on rank 0 and everything to logs/rank_N.log."""
    logs = folder / "logs"
    logs.mkdir(parents=True, exist_ok=True)
    root = logging.getLogger()
    root.setLevel(logging.INFO)
    for handler in list(root.handlers):
        root.removeHandler(handler)
    file = logging.FileHandler(logs / f"rank_{distributed.rank():05d}.log")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    root.addHandler(file)
    console = logging.StreamHandler(sys.stdout)
    console.setFormatter(logging.Formatter("%(asctime)s  %(message)s", "%H:%M:%S"))
    console.addFilter(logging.Filter("fd_large"))
    # Others speak only when they fail.
    console.setLevel(logging.INFO if distributed.is_main() else logging.ERROR)
    root.addHandler(console)
    # DeepSpeed brings its own console handler: its chatter belongs in the file.
    for name in ("DeepSpeed", "deepspeed"):
        library = logging.getLogger(name)
        for handler in list(library.handlers):
            library.removeHandler(handler)
        library.propagate = True
    logging.captureWarnings(True)
