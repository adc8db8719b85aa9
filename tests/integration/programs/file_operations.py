"""Rank program: file operations of one rank among many that are only pretended.

file_operations.py FOLDER CASES: JSON of [files, stage, rank, ranks]. FOLDER/FILES holds a run with
a checkpoint of so many files, which this rank resumes at that ZeRO stage and takes a student's
first weights from. Collectives return at once, with this rank's own values; what rank 0 does for
all is counted on rank 0 alone.
"""

from __future__ import annotations

import os
import sys
from collections import Counter
from collections.abc import Callable
from json import loads
from pathlib import Path
from typing import Any, TypeVar
from unittest.mock import patch

import torch.distributed as dist
from faults import Watched, watching
from launch import write_result
from torch.testing._internal.distributed.fake_pg import FakeStore
from unit.engine.conftest import Brightness

from fd_large.checkpoint import read, stream
from fd_large.engine import checkpoints
from fd_large.engine.zero import config as ds
from fd_large.engine.zero import partition, start
from fd_large.engine.zero.engine import build_engine
from fd_large.engine.zero.start import deepspeed
from fd_large.ranks import distributed
from fd_large.recipes.sections import Optim, Runtime

T = TypeVar("T")


def counted(folder: Path, action: Callable[[], Any]) -> dict[str, int]:
    """What this rank does in an action."""
    with watching(folder) as watched:

        def on_main(of_rank_0: Callable[[], T]) -> T:
            before = len(watched.operations), watched.bytes_read
            found = of_rank_0()
            if distributed.rank():
                del watched.operations[before[0] :]
                watched.bytes_read = before[1]
            return found

        with patch.object(read, "on_main", on_main), patch.object(checkpoints, "on_main", on_main):
            action()
    return summary(watched)


def summary(watched: Watched) -> dict[str, int]:
    counts: Counter[str] = watched.counts()
    states = counts["stat"] + counts["lstat"] + counts["fstat"]
    listings = counts["listdir"] + counts["scandir"]
    return {
        "opens": counts["open"],
        "states": states,
        "listings": listings,
        "bytes": watched.bytes_read,
    }


def one(folder: Path, stage: int, rank: int, ranks: int) -> dict[str, dict[str, int]]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank % 8), "WORLD_SIZE": str(ranks)}
    dist.init_process_group("fake", rank=rank, world_size=ranks, store=FakeStore())
    start.start()
    numbers = ds.RunNumbers(2, 1, ranks, ranks, 1.0, False, (8,))
    config = ds.fill({"zero_optimization": {"stage": stage}}, numbers)
    engine = build_engine(Brightness, config, optim=Optim(), seed=0)
    run = checkpoints.Checkpoints(
        folder,
        engine,
        runtime=Runtime(),
        global_batch_size=8,
        facts={"pictures": "all"},
        check_stored=lambda manifest: None,
    )
    shapes = {
        name: tuple(getattr(p, "ds_shape", p.shape))
        for name, p in engine.task.student.named_parameters()
    }

    def resume() -> None:
        run.sweep()
        assert run.resume() == 3

    def begin() -> None:
        reader = stream.newest(folder)
        stream.check(reader, shapes, prefix=stream.STUDENT)
        weights = ((n, stream.read(reader, stream.STUDENT + n, s)) for n, s in shapes.items())
        partition.load_weights(engine.task.student, weights, where="student.init")

    found = {"resume": counted(folder, resume)}
    if stage == 0:  # The module is on the CPU, unsplit; at stage 3 DeepSpeed owns it by now.
        found["init"] = counted(folder, begin)
    engine.deepspeed.destroy()
    start.forget_engines()
    dist.destroy_process_group()
    deepspeed.comm.comm.cdb = deepspeed.utils.groups._WORLD_GROUP = None
    return found


def main(folder: Path, cases: list[list[int]]) -> None:
    pretended = {
        "broadcast_object": lambda value, source=0: value,
        "gather_objects": lambda value: [value] * distributed.world_size(),
        "all_gather": lambda shard: shard.repeat(distributed.world_size()),
        # Another rank's tensors: of these this one reads nothing.
        "tensors_of_main": lambda items: items if distributed.is_main() else (),
        "barrier": lambda: None,
    }
    with patch.multiple(distributed, **pretended):
        found = [one(folder / str(files), *case) for files, *case in cases]
    os.environ["RANK"] = "0"
    write_result(folder, found)


if __name__ == "__main__":
    main(Path(sys.argv[1]), loads(sys.argv[2]))
