"""Rank program: trains under a canary while one rank's teacher loses a bit; how each run ends.

flipped.py FOLDER PICTURES; four ranks, nodes of two.
"""

import gc
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from launch import write_result
from twin import words

from fd_large.cli.ownership import owning
from fd_large.cli.train import parse_train
from fd_large.engine.run import train
from fd_large.engine.zero import partition, start
from fd_large.ranks import distributed
from fd_large.runtime import logs
from fd_large.runtime.hooks import Hook
from fd_large.tasks.jobs import job_of

RUNS = {
    # Steps between looks, and the rank that loses a bit.
    "replicated": (3, 2),
    "node": (3, 1),
    "sharded": (100, 3),
}


jobs = []


def kept_job(run):
    """The run's job, kept for the hook."""
    jobs.append(job_of(run))
    return jobs[-1]


@dataclass
class Flip(Hook):
    """Flips the lowest bit of one weight that `rank` holds: no map shows it."""

    rank: int
    kept_whole: bool
    done = 0

    def after_update(self, update):
        """Counts."""
        self.done = update.index + 1

    def on_save(self, index):
        """After the canary has looked."""
        if index != 2 or distributed.rank() != self.rank:
            return
        parameters = list(jobs[-1].teachers[""].module.parameters())
        flat = max((partition.shard(p)[0] for p in parameters), key=torch.numel)
        if self.kept_whole:
            flat = next(p.data.view(-1) for p in parameters if p.ds_persist and p.numel())
        flat[:1].view(torch.int32).bitwise_xor_(1)


folder, pictures = map(Path, sys.argv[-2:])
distributed.start()
found = {}
for placement, (every, rank) in RUNS.items():
    logs.start(distributed.rank())
    more = f"--optim.max_steps 20 --runtime.save_every 2 --engine.node_size 2 --data.workers 0 \
        --runtime.canary_every {every} --student.architecture.depths 1 1 \
        --teacher.placement {placement}"
    given = parse_train(words(pictures, folder / placement, *more.split(), ranks=4))
    # In the node, a tensor that every rank keeps whole beside its piece.
    flip = Flip(rank, kept_whole=placement == "node")
    with owning(given.run.run_dir()) as lease:
        code = train(
            given.run,
            kept_job,
            deepspeed_config=given.own.deepspeed_config,
            lease=lease,
            hooks=[flip],
        )
    found[placement] = {
        "code": code,
        "done": flip.done,
        "hash": jobs.pop().teachers[""].shard_hash(),
    }
    del flip
    start.forget_engines()
    gc.collect()
write_result(folder, found)
distributed.leave(0)
