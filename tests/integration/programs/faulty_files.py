"""train.py on a file system whose operations under checkpoints/ fail now and then, and pass.

FAULTS in the environment: JSON of seed, share (of the operations that fail, of reads a tenth of
it), stop_after (saves after which rank 0 asks the run to stop) and log, a file to which each error
adds a line.
"""

from __future__ import annotations

import errno
import json
import os
import random
import sys
from pathlib import Path

from faults import Operation, watching

from fd_large import files
from fd_large.checkpoint import read
from fd_large.cli import main as cli

ERRORS = (errno.EIO, errno.ESTALE, errno.ETIMEDOUT)


def main(words: list[str]) -> int:
    setting = json.loads(os.environ["FAULTS"])
    folder = Path(words[words.index("--runtime.run_dir") + 1])
    draw = random.Random(f"{setting['seed']} {os.environ.get('RANK')} {os.getpid()}")
    files.PAUSES, read.SECONDS_BETWEEN_TRIES = (0.02,) * 6, 0.02
    saves = 0

    def fails(operation: Operation) -> int | None:
        nonlocal saves
        if operation.name == "mkdir" and operation.done and os.environ.get("RANK") == "0":
            saves += 1
            if saves == setting["stop_after"]:
                (folder / "stop").touch()
        share = setting["share"] / (10 if operation.name == "preadv" else 1)
        if draw.random() >= share / 2:  # It is asked twice about each.
            return None
        number = draw.choice(ERRORS)
        line = f"{os.environ.get('RANK')} {errno.errorcode[number]} {operation}\n"
        descriptor = os.open(setting["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.write(descriptor, line.encode())
        os.close(descriptor)
        return number

    with watching(folder / "checkpoints", fails):
        return cli.main(["train", *words])


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
