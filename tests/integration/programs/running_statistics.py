"""Rank program: running statistics of a student's batch norms before and after two steps.

running_statistics.py FOLDER SCENARIO, a scenario as `scenarios.py` reads it.
"""

from __future__ import annotations

import json
import sys

from launch import write_result
from scenarios import start_engine, take_step, tiny_run

from fd_large.backbones.batch_norm import statistics_of
from fd_large.engine.task import Task
from fd_large.engine.zero import start
from fd_large.ranks import distributed


def noted(task: Task) -> dict[str, list[float]]:
    return {name: value.tolist() for name, value in statistics_of(task).items()}


def main(folder: str, scenario: str) -> None:
    distributed.start()
    start.start()
    given = json.loads(scenario)
    run = tiny_run(**given["run"])
    engine, _ = start_engine(run, given["zero"])
    engine.task.train()
    found = [noted(engine.task)]
    for update in range(2):
        take_step(engine, run, update)
        found.append(noted(engine.task))
    write_result(folder, found)
    distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[-2], sys.argv[-1])
