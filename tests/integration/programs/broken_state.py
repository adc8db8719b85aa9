"""Rank program: runs into whose state NaN gets after a step, as from memory that has failed.

broken_state.py FOLDER; in it runs.json, a list of runs, each with its `words` of train, and perhaps
`step`, `rank` and `kind`: after so many steps the first number of that rank's first tensor of the
kind becomes NaN. `unchecked` saves and restores as a version did that asked nothing; `kill` is the
step after which each rank kills itself. The ranks leave the exit code of every run.
"""

from __future__ import annotations

import gc
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from launch import write_result


def main(folder: Path) -> int:
    """Trains; returns the last run's exit code."""
    # After the launch's variables are read; seconds.
    from fd_large.cli import main as cli
    from fd_large.engine import opening, run
    from fd_large.engine.zero import start, state
    from fd_large.ranks import distributed
    from fd_large.runtime.hooks import Hook, Update

    engines: list[Any] = []
    build_engine, not_finite = opening.build_engine, state.not_finite
    train, leave = run.train, distributed.leave

    def kept_engine(*arguments: Any, **named: Any) -> Any:
        engines[:] = [build_engine(*arguments, **named)]
        return engines[0]

    class Break(Hook):
        def __init__(self, what: dict[str, Any]) -> None:
            self.what = what

        def after_update(self, update: Update) -> None:
            done, what = update.index + 1, self.what
            if (done, distributed.rank()) == (what.get("step"), what.get("rank")):
                pieces = state.shards(engines[0])
                values = next(p.values for p in pieces if p.key.startswith(f"{what['kind']}."))
                values.view(-1)[0] = torch.nan
            if done == what.get("kill"):
                os.kill(os.getpid(), signal.SIGKILL)

    opening.build_engine, distributed.leave = kept_engine, lambda code: code
    codes = []
    for what in json.loads((folder / "runs.json").read_text()):
        state.not_finite = (lambda engine: []) if what.get("unchecked") else not_finite
        hooks = [Break(what)]
        run.train = lambda *given, hooks=hooks, **named: train(*given, hooks=hooks, **named)
        codes.append(cli.main(["train", *what["words"]]))
        engines.clear()
        start.forget_engines()
        gc.collect()
    write_result(folder, codes)
    return leave(codes[-1])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
