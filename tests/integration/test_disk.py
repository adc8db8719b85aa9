"""Runs whose state is on a disk: to the bit those in memory, from and to them, and killed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from closeness import distance
from kills import state
from launch import start_ranks
from pictures import write_pictures
from twin import TRAIN, losses, train, words

# Not clipped: DeepSpeed rounds the norm otherwise where state is offloaded. Two micro batches.
STEPS = (
    *("--engine.precision", "bfloat16", "--optim.clip_norm", "0", "--optim.ema_decay", "0.9"),
    *("--optim.max_steps", "4", "--runtime.save_every", "2", "--runtime.keep_last", "2"),
    *("--batch.global_batch_size", "12", "--batch.micro_batch_size", "3"),
    *("--optim.layer_decay", "0.8"),
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 26)


@pytest.fixture(scope="module")
def in_memory(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "in_memory"
    train(pictures, run_dir, *STEPS)
    return run_dir


def on_disk(folder: Path) -> tuple[str, ...]:
    folder.mkdir()
    return ("--engine.nvme_path", str(folder))


def assert_same(run_dir: Path, other: Path) -> None:
    found, expected = state(run_dir, 4), state(other, 4)
    assert {key.partition(".")[0] for key in found} == {"master", "exp_avg", "exp_avg_sq", "ema"}
    assert found.keys() == expected.keys()
    assert all(torch.equal(values, expected[key]) for key, values in found.items())
    assert losses(run_dir) == losses(other)


def test_a_killed_run_on_a_disk_leaves_no_file_and_ends_in_memory(
    pictures: Path, in_memory: Path, tmp_path: Path
) -> None:
    more, run_dir = (*STEPS, *on_disk(tmp_path / "disk")), tmp_path / "run"
    started = start_ranks(TRAIN, *words(pictures, run_dir, *more, config="zero3_nvme"), ranks=2)
    try:
        started.until((run_dir / "checkpoints/step_00000002").exists)
        was_alive = any(process.poll() is None for process in started.processes)
    finally:
        output = "".join(started.kill())
    assert was_alive, output
    assert not list((tmp_path / "disk").iterdir())
    train(pictures, run_dir, *STEPS)
    assert_same(run_dir, in_memory)


@pytest.mark.closeness
def test_a_run_in_memory_goes_on_on_a_disk(pictures: Path, in_memory: Path, tmp_path: Path) -> None:
    """On as many ranks to the bit; on one rank within what sums in another order make."""
    for ranks in (2, 1):
        run_dir = tmp_path / f"run_{ranks}"
        shutil.copytree(in_memory, run_dir)
        shutil.rmtree(run_dir / "checkpoints/step_00000004")
        more = (*STEPS, *on_disk(tmp_path / f"disk_{ranks}"))
        train(pictures, run_dir, *more, config="zero3_nvme", ranks=ranks)
        if ranks == 2:
            assert_same(run_dir, in_memory)
        else:
            assert distance(losses(run_dir), losses(in_memory)) <= 1e-4


def test_a_folder_that_is_none_is_refused_before_anything_is_read(
    pictures: Path, tmp_path: Path
) -> None:
    flags = (*STEPS, "--engine.nvme_path", "/dev/shm")
    done = train(pictures, tmp_path / "run", *flags, config="zero3_nvme", ranks=1, check=False)
    assert done.returncodes == [2]
    assert "engine.nvme_path: /dev/shm" in done.outputs[0]
    assert not (tmp_path / "run/recipe.json").exists()
