"""Rank program: starts of one run, one after the other, each stopped by a rank at a set moment.

preempted.py FOLDER WORDS OF TRAIN...; stops.json in FOLDER: [[moment, how, rank, update], ...]. The
rank does it to itself, from inside the trainer's own calls, so that nothing depends on time. Each
rank leaves how every start ended; its own exit code is that of the last.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
import threading
from pathlib import Path
from typing import Any

from launch import write_result

from fd_large.checkpoint import tensor_file
from fd_large.cli import main as cli
from fd_large.engine import run
from fd_large.engine.zero import start
from fd_large.ranks import distributed
from fd_large.runtime import preemption
from fd_large.runtime.hooks import Hook, Setting, Update

SECONDS = 60.0


class Stop(Hook):
    """Asks the run to stop, once, at a moment after `update` steps.

    Args:
        moment: "micro batch", the second of the next step; "judge", inside the next step, when
            the ranks have just agreed to go on; "evaluation", its second batch; "cache", the second
            batch of the maps that are missing in it; "save": while this rank's file is written, and
            until the ranks have agreed and are about to save again.
        how: A signal to this process, or "file".
        update: Steps before it.
    """

    def __init__(self, moment: str, how: str, update: int) -> None:
        self.moment, self.how, self.update = moment, how, update
        self.asked, self.agreed = threading.Event(), threading.Event()
        self.beats = 0

    def on_start(self, setting: Setting) -> None:
        self.folder, self.done = setting.folder, setting.first_update

    def ask(self) -> None:
        if self.how == "file":
            (self.folder / "stop").touch()
        else:
            os.kill(os.getpid(), signal.Signals[self.how])
        self.asked.set()

    def beat(self) -> None:
        self.beats += 1
        if self.done != self.update:
            return
        if self.moment == "save":
            # Without it the writing thread might come to it some steps later.
            assert self.asked.wait(SECONDS)
        elif self.moment in ("micro batch", "evaluation", "cache") and self.beats == 2:
            self.ask()

    def judge(self, update: Update) -> None:
        if self.moment == "judge" and self.done == self.update:
            self.ask()

    def after_update(self, update: Update) -> None:
        self.done, self.beats = update.index + 1, 0

    def on_save(self, index: int) -> None:
        if self.asked.is_set():
            self.agreed.set()
            # Once more, as schedulers do: the run is saving already.
            os.kill(os.getpid(), signal.SIGTERM)

    def saving(self, path: Path, copies: dict[str, Any]) -> tensor_file.Checksums:
        """In place of `tensor_file.write`."""
        if self.moment == "save" and self.done == self.update and not self.asked.is_set():
            path.write_bytes(b"half of it")
            self.ask()
            assert self.agreed.wait(SECONDS)
        return write(path, copies)


def one_start(words: list[str], stop: Stop) -> dict[str, Any]:
    """Trains until it is stopped; returns exit code, status and the newest checkpoint's update."""

    def watched(*arguments: Any, **named: Any) -> int:
        return train(*arguments, hooks=[stop], **named)

    run.train, tensor_file.write = watched, stop.saving
    code = cli.main(["train", *words])
    distributed.barrier()
    newest = max(stop.folder.glob("checkpoints/step_????????"), default=None)
    manifest = json.loads((newest / "manifest.json").read_text()) if newest else {}
    return {
        "code": code,
        "status": json.loads((stop.folder / "summary.json").read_text())["status"],
        "update": manifest.get("update", 0),
        "evaluated": manifest.get("evaluated", True),
        "left": sorted(p.name for p in stop.folder.glob("stop*")),
    }


if __name__ == "__main__":
    # deepspeed puts its own word first.
    folder, *words = [word for word in sys.argv[1:] if not word.startswith("--local_rank")]
    train, write, leave = run.train, tensor_file.write, distributed.leave
    distributed.leave = lambda code: code
    preemption.SECONDS_BETWEEN_LOOKS = 0.0
    ends = []
    for moment, how, rank, update in json.loads((Path(folder) / "stops.json").read_text()):
        distributed.start()
        here = rank == distributed.rank()
        ends.append(one_start(words, Stop(moment if here else "never", how, update)))
        start.forget_engines()
        gc.collect()
    write_result(folder, ends)
    sys.exit(leave(ends[-1]["code"]))
