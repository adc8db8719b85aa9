"""Rank program: restores a run's newest checkpoint at ZeRO-3 and saves it as the next step.

read_and_save.py RUN, with the run's recipe.json and checkpoints in it.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

from launch import ROOT

from fd_large.engine.opening import open_run
from fd_large.ranks import distributed
from fd_large.recipes.run import Run
from fd_large.tasks.jobs import job_of


def main(folder: Path) -> None:
    run = Run.from_dict(json.loads((folder / "recipe.json").read_text()))
    run = replace(run, runtime=replace(run.runtime, run_dir=str(folder)))
    opened = open_run(run, job_of, deepspeed_config=str(ROOT / "ds_configs/zero3.json"))
    updates = opened.checkpoints.resume()
    opened.checkpoints.save(updates + 1)
    assert opened.checkpoints.settle()
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
