"""A linear probe as a run: on any number of ranks, and resumed."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from closeness import distance
from labelled_folder import labelled_folder
from launch import ROOT, run_ranks

from fd_large.checkpoint.read import newest_sound

TRAIN = ROOT / "fd_large" / "train.py"
FLAGS = """
--recipe linear_probe --data.image_size 16 --data.workers 0 --batch.global_batch_size 16
--task.linear.norm_batch 8 --optim.epochs 2 --optim.warmup_epochs 0 --optim.base_lr 300
--student.architecture.embed_dim 16 --student.architecture.depths 1
--student.architecture.num_heads 2 --student.architecture.patch_size 8
--runtime.save_every 3 --runtime.keep_last 9 --runtime.log_every 1
"""


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """50 images to train on, three steps an epoch, and 11 for tests."""
    return labelled_folder(tmp_path_factory.mktemp("labelled"), train=50, val=11, classes=3)


def probe(images: Path, folder: Path, *, ranks: int, micro: int, config: str) -> None:
    run_ranks(
        TRAIN,
        *("--deepspeed_config", str(ROOT / f"ds_configs/{config}.json")),
        *FLAGS.split(),
        *("--data.root", str(images), "--runtime.run_dir", str(folder)),
        *("--batch.micro_batch_size", str(micro)),
        ranks=ranks,
    )


def outcome(folder: Path) -> tuple[list[float], dict, dict[str, np.ndarray]]:
    """Every step's loss, the last evaluation, and what is stored."""
    losses = [json.loads(row)["loss"] for row in (folder / "metrics.jsonl").open()]
    reader, _ = newest_sound(folder)
    tensors = {
        f"{kind}.{name}": reader.read(kind, name, 0, size).numpy()
        for name, size in reader.layout.sizes.items()
        for kind in ("master", *(["momentum_buffer"] if name.startswith("head.") else []))
    }
    return losses, json.loads((folder / "summary.json").read_text()), tensors


@pytest.mark.closeness
def test_it_is_the_same_on_any_number_of_ranks_and_after_a_resume(images, tmp_path):
    two, one = tmp_path / "two", tmp_path / "one"
    # Micro batches of four end inside the groups of eight.
    probe(images, two, ranks=2, micro=4, config="zero1")
    probe(images, one, ranks=1, micro=16, config="zero3")
    (losses, summary, tensors), alone = outcome(two), outcome(one)
    assert len(losses) == 6
    assert distance(losses, alone[0]) <= 2e-6
    assert summary["test_top1"] == alone[1]["test_top1"]
    assert summary["test_loss"] == pytest.approx(alone[1]["test_loss"], rel=1e-5)
    names = {"head.weight", "head.bias", "running_mean", "running_var"}
    assert {name.partition(".")[2] for name in tensors} == names, "the frozen model is not stored"
    for name, values in tensors.items():
        assert distance(values, alone[2][name]) <= 1e-5, name
    assert not np.allclose(tensors["master.running_var"], 1, atol=0.1)

    shutil.rmtree(two / "checkpoints" / "step_00000006")
    probe(images, two, ranks=2, micro=4, config="zero1")
    again = outcome(two)
    assert (again[0], again[1]["test_loss"]) == (losses, summary["test_loss"])
    for name, values in tensors.items():
        assert np.array_equal(values, again[2][name]), name
