"""Checkpoints under fire: kills, other ranks and stages, full disks, damage."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from closeness import distance
from kills import kill_and_resume, state
from launch import ROOT, read_results, run_ranks
from pictures import write_pictures
from small_disk import mounted
from stored_run import store_tensors
from twin import WITH_LOADERS, losses, train
from unit.engine.conftest import Brightness

# The first of the kills waits for a save under way; tests/soak/kills.py has more of them.
KILLS = 2
# Three steps an epoch: most kills and resumes are in mid-epoch.
EVERY_UPDATE = (
    *WITH_LOADERS,
    *("--optim.max_steps", "16", "--runtime.save_every", "1"),
    *("--optim.layer_decay", "0.8", "--optim.ema_decay", "0.9"),
    *("--objective.normaliser", "running"),
)
PROGRAMS = Path(__file__).parent / "programs"
MAIN = ROOT / "fd_large" / "__main__.py"
TWELVE = (
    *("--batch.global_batch_size", "12", "--batch.micro_batch_size", "3"),
    *("--optim.max_steps", "4", "--runtime.save_every", "2"),
)
TWELVE_MORE = (
    *("--batch.global_batch_size", "12", "--optim.max_steps", "8"),
    *("--runtime.save_every", "2", "--runtime.keep_last", "4", "--optim.ema_decay", "0.9"),
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 26)


def test_killed_runs_end_with_the_same_weights(pictures: Path, tmp_path: Path) -> None:
    train(pictures, tmp_path / "calm", *EVERY_UPDATE)
    met = kill_and_resume(pictures, tmp_path / "killed", KILLS, 0, *EVERY_UPDATE, longest_rest=0.2)
    train(pictures, tmp_path / "killed", *EVERY_UPDATE)
    assert all(kill["alive"] for kill in met), met
    assert sum(kill["in a save"] for kill in met) == 1, met
    # Runs went on from where the ones before were killed, not from the beginning.
    assert sum(kill["resumed from"] > 0 for kill in met) >= KILLS - 1, met
    calm, killed = state(tmp_path / "calm", 16), state(tmp_path / "killed", 16)
    assert calm.keys() == killed.keys()
    for key, values in calm.items():
        assert torch.equal(values, killed[key]), key
    assert losses(tmp_path / "killed") == losses(tmp_path / "calm")
    assert not list((tmp_path / "killed/checkpoints").glob("*.part"))


@pytest.fixture(scope="module")
def reference(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps of a global batch of 12 on two ranks at ZeRO-3, and the checkpoint of two."""
    run_dir = tmp_path_factory.mktemp("runs") / "reference"
    train(pictures, run_dir, *TWELVE)
    return run_dir


def halfway(reference: Path, run_dir: Path) -> Path:
    shutil.copytree(reference, run_dir)
    shutil.rmtree(run_dir / "checkpoints/step_00000004")
    return run_dir


@pytest.fixture(scope="module")
def two_rates(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight steps, with groups of different rate and decay, and an average of the weights."""
    run_dir = tmp_path_factory.mktemp("runs") / "two_rates"
    micro = ("--batch.micro_batch_size", "3")
    train(pictures, run_dir, *TWELVE_MORE, *micro, program=PROGRAMS / "two_rates.py")
    return run_dir


@pytest.mark.closeness
@pytest.mark.parametrize(
    ("ranks", "config"),
    [
        *((1, "zero3"), (3, "zero2"), (2, "zero3_offload")),
        *(pytest.param(*of, marks=pytest.mark.sweep) for of in ((3, "zero3"), (2, "zero1"))),
    ],
)
def test_resumes_on_other_ranks_and_stages(
    ranks: int, config: str, pictures: Path, two_rates: Path, tmp_path: Path
) -> None:
    """Six steps after the change, two micro batches each; the groups keep their settings."""
    run_dir = tmp_path / "run"
    shutil.copytree(two_rates, run_dir)
    for update in (4, 6, 8):
        shutil.rmtree(run_dir / f"checkpoints/step_{update:08d}")
    train(
        pictures,
        run_dir,
        *TWELVE_MORE,
        *("--batch.micro_batch_size", str(6 // ranks)),
        ranks=ranks,
        config=config,
        program=PROGRAMS / "two_rates.py",
    )
    assert distance(losses(run_dir), losses(two_rates)) <= 1e-6
    # And back, to the bit: two ranks at ZeRO-3 read what that stage wrote, and save it at once.
    back = tmp_path / "back"
    back.mkdir()
    shutil.copy(run_dir / "recipe.json", back)
    shutil.copytree(run_dir / "checkpoints", back / "checkpoints")
    run_ranks(PROGRAMS / "read_and_save.py", back, ranks=2)
    before, after = state(run_dir, 8), state(back, 9)
    assert before.keys() == after.keys()
    assert all(torch.equal(values, after[key]) for key, values in before.items())


def test_damage_is_named_and_the_one_before_is_taken(
    pictures: Path, reference: Path, tmp_path: Path
) -> None:
    run_dir, both = tmp_path / "run", tmp_path / "both"
    shutil.copytree(reference, run_dir)
    # Rank 0 reads another file.
    victim = _flip_a_byte(run_dir / "checkpoints/step_00000004")
    finished = train(pictures, run_dir, *TWELVE)
    assert "DAMAGED CHECKPOINT" in finished.outputs[0]
    assert victim in finished.outputs[0]
    assert "resumed after step 2 of 4" in finished.outputs[0]
    assert losses(run_dir) == losses(reference)
    shutil.copytree(reference, both)
    for folder in (both / "checkpoints").iterdir():
        _flip_a_byte(folder)
    verified = run_ranks(MAIN, "checkpoint", "verify", both, ranks=1, check=False)
    assert verified.returncodes == [1]
    assert "0 of 2 checkpoints are sound" in verified.outputs[0]


def _flip_a_byte(checkpoint: Path) -> str:
    victim = checkpoint / "rank_00001.safetensors"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(content)
    return victim.name


def test_no_rank_does_more_with_files_because_there_are_more_ranks(tmp_path: Path) -> None:
    """Rank 0 and rank 37 of 64 that are pretended; the checkpoints were written by 8, 64, 256."""
    torch.manual_seed(0)
    tensors = {name: p.detach() for name, p in Brightness().named_parameters()}
    written, ranks = (8, 64, 256), 64
    for files in written:
        moments = ("exp_avg", "exp_avg_sq")
        store_tensors(tmp_path / str(files), tensors, ranks=files, moments=moments)
    cases = [[files, stage, 37, ranks] for files in written for stage in (0, 1, 2, 3)]
    cases += [[files, 0, 0, ranks] for files in written]
    run_ranks(
        *(PROGRAMS / "file_operations.py", tmp_path, json.dumps(cases)),
        ranks=1,
        results=tmp_path,
    )
    for (files, stage, rank, _), found in zip(cases, read_results(tmp_path, 1)[0], strict=True):
        share, resume = -(-files // ranks), found["resume"]
        # Its share of the files is checked, and read with its neighbours where shards are cut
        # otherwise. From ZeRO 3 to 1 and 2 the cuts have nothing in common: at most all are read.
        most = 6 * share if stage in (0, 3) else 2 * share + files
        assert resume["opens"] <= most + 2 * (rank == 0), (files, stage, rank)
        assert resume["states"] <= most
        assert resume["listings"] <= 2 * (rank == 0)
        if init := found.get("init"):
            # Receipt, check and reading; the others open the manifest and are sent the tensors.
            assert init["opens"] <= (3 * files + 2 if rank == 0 else 2)
            assert init["listings"] <= 2


def test_another_model_is_refused(pictures: Path, reference: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(reference, run_dir)
    (run_dir / "recipe.json").unlink()
    other_model = ("--student.architecture.depths", "3", "1")
    refused = train(pictures, run_dir, *TWELVE, *other_model, check=False)
    assert refused.returncodes == [2, 2]
    assert "belongs to another model" in refused.outputs[0]
    assert "Traceback" not in refused.outputs[0]


@pytest.fixture
def checkpoint_bytes(reference: Path) -> int:
    return sum(path.stat().st_size for path in reference.glob("checkpoints/step_00000004/*"))


@pytest.fixture
def small_disk(checkpoint_bytes: int, tmp_path: Path) -> Iterator[Path]:
    """A file system that takes three checkpoints: two that stay and one being written."""
    yield from mounted(tmp_path, str(int(3.4 * checkpoint_bytes)))


def test_a_full_disk_keeps_what_is_there_and_training_goes_on(
    pictures: Path, reference: Path, small_disk: Path, checkpoint_bytes: int
) -> None:
    run_dir = small_disk / "run"
    block = small_disk / "block"
    # One checkpoint fits beside it, and half of another.
    block.write_bytes(bytes(int(1.9 * checkpoint_bytes)))
    words = (*TWELVE, "--runtime.save_every", "1")
    finished = train(pictures, run_dir, *words, check=False)
    assert finished.returncodes == [3, 3], "the last checkpoint is not there: somebody has to look"
    output = finished.outputs[0]
    assert "CHECKPOINT of step 2 was discarded" in output
    assert "Make room" in output
    assert [p.name for p in (run_dir / "checkpoints").iterdir()] == ["step_00000001"]
    assert losses(run_dir) == losses(reference)
    # Space is back: the same command goes on from what stands, to the end.
    block.unlink()
    train(pictures, run_dir, *words)
    assert losses(run_dir) == losses(reference)
    assert (run_dir / "checkpoints/step_00000004").is_dir()


def test_deepspeeds_own_format_goes_out_and_comes_back(
    pictures: Path, reference: Path, tmp_path: Path
) -> None:
    run_dir = halfway(reference, tmp_path / "run")
    outside, back = tmp_path / "outside", tmp_path / "back"
    config = ("--deepspeed_config", str(ROOT / "ds_configs/zero3.json"))
    run_ranks(MAIN, "checkpoint", "export", run_dir, outside, *config, ranks=2)
    assert (outside / "latest").read_text() == "update_2"
    back.mkdir()
    shutil.copy(run_dir / "recipe.json", back)
    run_ranks(MAIN, "checkpoint", "import", outside, back, *config, ranks=2)
    before, after = state(run_dir, 2), state(back, 2)
    assert all(torch.equal(values, after[key]) for key, values in before.items())
    assert before.keys() == after.keys()
