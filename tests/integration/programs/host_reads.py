"""Rank program: where a training run's own code makes the host read a tensor's value.

host_reads.py FOLDER WORDS... trains with these words for train.py and writes, for each whole step
(the last one and the log steps too), the functions of fd_large that read. What DeepSpeed reads
by itself is not counted.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from launch import ROOT, write_result
from torch.overrides import TorchFunctionMode

from fd_large.cli import main as cli
from fd_large.cli import train
from fd_large.engine.loop import Trainer
from fd_large.ranks import distributed

READS = {
    getattr(torch.Tensor, name)
    for name in (
        *("item", "tolist", "numpy", "cpu", "nonzero", "__bool__", "__int__", "__float__"),
        *("__index__", "__contains__", "__array__", "equal", "is_nonzero"),
    )
} | {torch.equal, torch.nonzero, torch.is_nonzero}
found: dict[int, list[str]] = defaultdict(list)


class Watch(TorchFunctionMode):
    """Notes every read whose caller is a file of fd_large."""

    def __init__(self, update: int) -> None:
        super().__init__()
        self.update = update

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in READS:
            caller = sys._getframe(1)
            path = Path(caller.f_code.co_filename)
            if path.is_relative_to(ROOT / "fd_large"):
                found[self.update].append(f"{path.stem}.{caller.f_code.co_name}")
        return func(*args, **(kwargs or {}))


def watched(self: Trainer, *arguments: Any) -> None:
    found[self.finished] = []
    with Watch(self.finished):
        one_update(self, *arguments)


if __name__ == "__main__":
    one_update, Trainer.take_step = Trainer.take_step, watched
    folder, *words = sys.argv[1:]
    leave = distributed.leave
    distributed.leave = lambda code: code
    # The images at a run's end are another matter, and take longer than the run.
    train.show_report = lambda folder: None
    code = cli.main(["train", *words])
    # RANK is where write_result finds its file's name.
    os.environ.setdefault("RANK", "0")
    write_result(folder, {"code": code, "reads": found})
    sys.exit(leave(code))
