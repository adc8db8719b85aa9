"""The G recipe's shrunken twin as a command: extra norms, checkpointing, a split teacher."""

from __future__ import annotations

import json
from pathlib import Path

from launch import ROOT, Finished, Launcher, Started, run_ranks, start_ranks

TRAIN = ROOT / "fd_large" / "train.py"
FLAGS = """
--recipe fd_swinv2g
--student.architecture.embed_dim 32 --student.architecture.depths 2 1
--student.architecture.num_heads 1 2 --student.architecture.window_size 4
--student.architecture.extra_norm_every 2
--teacher.architecture.embed_dim 16 --teacher.architecture.depths 1 1
--teacher.architecture.num_heads 1 2 --teacher.architecture.window_size 4
--teacher.source random --data.image_size 32 --data.workers 0 --runtime.log_every 1
--optim.base_lr 1e-2 --optim.warmup_epochs 0
"""
GLOBAL_BATCH = 8
# A process that loads images, forked by each rank for each epoch, takes a fifth of a run.
WITH_LOADERS = ("--data.workers", "1")


def words(
    pictures: Path, run_dir: Path, *more: str, config: str = "zero3", ranks: int = 2
) -> list[str]:
    """The command's arguments; a rank's share of a step is one micro batch, which is quickest."""
    return [
        "--deepspeed_config",
        str(ROOT / f"ds_configs/{config}.json"),
        *FLAGS.split(),
        "--data.root",
        str(pictures),
        "--runtime.run_dir",
        str(run_dir),
        *("--batch.global_batch_size", str(GLOBAL_BATCH)),
        *("--batch.micro_batch_size", str(GLOBAL_BATCH // ranks)),
        *more,
    ]


def train(
    pictures: Path,
    run_dir: Path,
    *more: str,
    ranks: int = 2,
    launcher: Launcher = "plain",
    config: str = "zero3",
    check: bool = True,
    env: dict[str, str] | None = None,
    timeout: float = 180.0,
    program: Path = TRAIN,
    forked: bool = True,
) -> Finished:
    """Trains to the end."""
    return run_ranks(
        program,
        *words(pictures, run_dir, *more, config=config, ranks=ranks),
        ranks=ranks,
        launcher=launcher,
        check=check,
        env=env,
        timeout=timeout,
        forked=forked,
    )


def start(
    pictures: Path,
    run_dir: Path,
    *more: str,
    ranks: int = 2,
) -> Started:
    """Starts to train; the caller must `kill`."""
    return start_ranks(TRAIN, *words(pictures, run_dir, *more, ranks=ranks), ranks=ranks)


def losses(run_dir: Path) -> list[float]:
    """Every step's loss, each once and in order."""
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == list(range(len(rows)))
    return [row["loss"] for row in rows]
