"""A tiny run by slurm/fd_swinv2g.sh on the nodes of a test's cluster."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import NamedTuple

import forked_python
from launch import ROOT
from slurm_cluster import Cluster

# 2 ranks, 8 images a step, a quarter of a second on a busy core.
FLAGS = """
--student.architecture.embed_dim 16 --student.architecture.depths 1 1 2 1
--student.architecture.num_heads 1 1 2 4 --student.architecture.window_size 2
--student.architecture.extra_norm_every 2
--teacher.architecture.embed_dim 16 --teacher.architecture.depths 1 1 1 1
--teacher.architecture.num_heads 1 1 2 4 --teacher.architecture.window_size 2
--data.image_size 64 --data.workers 1 --optim.base_lr 1e-2 --optim.warmup_epochs 0
--batch.global_batch_size 8 --batch.micro_batch_size 4
--runtime.log_every 1 --runtime.save_every 1
"""
NODES = ("--nodes=2", "--ntasks-per-node=1", "--gres=none", "--cpus-per-task=1")


class Job(NamedTuple):
    """A submitted job: its number, its folder of logs and the folder of its run."""

    number: int
    logs: Path
    run_dir: Path
    environ: dict[str, str]

    def said(self) -> str:
        """What the batch script and the ranks said, over all starts."""
        paths = [self.logs / "batch.out", *sorted(self.logs.glob("*-rank_*.log"))]
        return "\n".join(
            f"--- {path.name}\n{path.read_text(errors='replace')}"
            for path in paths
            if path.exists()
        )

    def again(self, cluster: Cluster, script: str, *words: object) -> Job:
        """Submits another script for the same run."""
        logs = self.logs.with_name(f"{self.logs.name}-{Path(script).stem}")
        logs.mkdir()
        environ = self.environ | {"LOG_DIR": str(logs)}
        output = f"--output={logs}/batch.out"
        number = cluster.submit(*NODES, "--time=20", output, script, *words, environ=environ)
        return Job(number, logs, self.run_dir, environ)


def start(
    cluster: Cluster,
    folder: Path,
    name: str,
    *words: str,
    updates: int,
    sbatch: tuple[str, ...] = (),
    environ: dict[str, str] | None = None,
    script: str = "slurm/fd_swinv2g.sh",
    flags: str = FLAGS,
    nodes: tuple[str, ...] = NODES,
    forked: bool = True,
) -> Job:
    """Submits a batch script for a run FOLDER/NAME, on FOLDER/pictures unless environ has more.

    `nodes` are options of sbatch, which win over the script's own lines.
    Unless it is `forked`, its ranks import torch themselves.
    """
    logs, run_dir = folder / f"{name}-logs", folder / f"{name}-run"
    logs.mkdir()
    given = {
        "DATA_ROOT": str(folder / "pictures"),
        "TEACHER_SOURCE": "random",
        **(forked_python.environment(folder) if forked else {"PYTHON": sys.executable}),
        "PYTHONPATH": str(ROOT),
        "PYTHONWARNINGS": "ignore::FutureWarning",
        "LOG_DIR": str(logs),
        "DS_ACCELERATOR": "cpu",
    } | (environ or {})
    number = cluster.submit(
        *(*nodes, "--time=20", f"--output={logs}/batch.out", *sbatch, script),
        *(*flags.split(), "--optim.max_steps", updates, "--runtime.run_dir", run_dir, *words),
        environ=given,
    )
    return Job(number, logs, run_dir, given)


def lines(job: Job, part: str) -> list[str]:
    """The lines of rank 0 that hold some words."""
    return [
        line
        for path in job.logs.glob("*-rank_0.log")
        for line in path.read_text(errors="replace").splitlines()
        if part in line
    ]


def updates_done(run_dir: Path) -> int:
    """Rows that stand in the run's metrics."""
    path = run_dir / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0
