"""Somebody cuts, overwrites or replaces the teacher's file while two ranks learn from it."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
import torch
import twin
from launch import ROOT, Started, start_ranks
from loading import made, saved
from pictures import write_pictures

STEPS = 12
FLAGS = """
--recipe fd_swinv2g
--student.architecture.embed_dim 32 --student.architecture.depths 1 1
--student.architecture.num_heads 1 2 --student.architecture.window_size 4
--teacher.model dino_vit_base_patch16 --teacher.architecture.embed_dim 32
--teacher.architecture.depths 2 --teacher.architecture.num_heads 2
--teacher.architecture.patch_size 8 --teacher.architecture.image_size 32
--teacher.placement replicated
--data.image_size 32 --data.workers 0 --runtime.log_every 1 --runtime.save_every 2
--runtime.canary_every 4 --optim.warmup_epochs 0
--batch.global_batch_size 8 --batch.micro_batch_size 4
"""


def start(folder: Path, weights: Path, steps: int) -> Started:
    """Starts two ranks whose teacher is a file."""
    words = ["--deepspeed_config", ROOT / "ds_configs/zero2.json", *FLAGS.split()]
    words += ["--data.root", write_pictures(folder / "pictures", 26)]
    words += ["--runtime.run_dir", folder / "run", "--teacher.source", weights]
    return start_ranks(twin.TRAIN, *words, "--optim.max_steps", steps, ranks=2)


def rows(folder: Path) -> int:
    """Number of steps that the run has written down."""
    path = folder / "run" / "metrics.jsonl"
    return len(path.read_text().splitlines()) if path.exists() else 0


def cut(path: Path) -> None:
    """Takes all pages away."""
    os.truncate(path, 0)


def overwrite(path: Path) -> None:
    """Writes other numbers to the same file; its size stays."""
    other = torch.randn(path.stat().st_size // 4).numpy().tobytes()
    with path.open("r+b") as file:
        file.seek(path.stat().st_size // 2)
        file.write(other[: path.stat().st_size // 4])


@pytest.mark.parametrize(
    ("ending", "change"), [("pth", cut), ("safetensors", cut), ("safetensors", overwrite)]
)
def test_a_file_that_is_changed_ends_the_run_in_a_sentence(ending, change, tmp_path):
    weights = saved(made("dino_vit_base_patch16"), tmp_path / f"teacher.{ending}")
    started = start(tmp_path, weights, 100_000)
    try:
        started.until(lambda: rows(tmp_path) >= 3)
        change(weights)
        codes = [process.wait(60) for process in started.processes]
    finally:
        output = "\n".join(started.kill())
    # Both see it, or one of them does and the other hears of it.
    assert max(codes) == 3, output
    assert min(codes) in (1, 3), output
    assert f"{weights}: the file was cut or written over" in output
    assert "node" not in output.split("cut or written over")[1]
    assert "Fatal Python error" not in output
    assert "Traceback" not in output
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["status"] == "failed"
    assert str(weights) in summary["reason"]


def test_a_file_that_is_replaced_by_another_name_is_none_of_the_runs_business(tmp_path):
    weights = saved(made("dino_vit_base_patch16"), tmp_path / "teacher.pth")
    started = start(tmp_path, weights, STEPS)
    try:
        started.until(lambda: rows(tmp_path) >= 3)
        weights.with_name("new").write_bytes(b"others")
        weights.with_name("new").rename(weights)
        codes = [process.wait(120) for process in started.processes]
    finally:
        output = "\n".join(started.kill())
    assert codes == [0, 0], output
    assert rows(tmp_path) == STEPS
