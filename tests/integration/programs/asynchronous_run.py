"""Rank program: trains on a device that lags behind the host, and writes what was seen of it.

asynchronous_run.py FOLDER WORDS... trains with these words for train.py and writes, for each step,
what made the host wait for the device, without what an evaluation or a checkpoint after it waits
for, and for the whole run what no event orders.
"""

from __future__ import annotations

import os
import sys
from typing import Any

import asynchronous
from launch import write_result

from fd_large.cli import main as cli
from fd_large.cli import train
from fd_large.engine import own_stream
from fd_large.engine.loop import Trainer
from fd_large.ranks import distributed

DEVICE = asynchronous.install()
own_stream._has_streams = lambda device: True
steps: dict[int, list[str]] = {}


def watched(self: Trainer, *arguments: Any) -> None:
    DEVICE.waits.clear()
    take_step(self, *arguments)


def after_step(self: Trainer, *arguments: Any) -> None:
    steps[self.finished] = list(DEVICE.waits)
    save_and_evaluate(self, *arguments)


if __name__ == "__main__":
    take_step, Trainer.take_step = Trainer.take_step, watched
    save_and_evaluate, Trainer._save_and_evaluate = Trainer._save_and_evaluate, after_step
    folder, *words = sys.argv[1:]
    leave = distributed.leave
    distributed.leave = lambda code: code
    # The images at a run's end are another matter, and take longer than the run.
    train.show_report = lambda folder: None
    with DEVICE:
        code = cli.main(["train", *words])
    # RANK is where write_result finds its file's name.
    os.environ.setdefault("RANK", "0")
    write_result(folder, {"code": code, "steps": steps, "races": sorted(DEVICE.races)})
    sys.exit(leave(code))
