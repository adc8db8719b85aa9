"""The real commands on real images: launchers, run folder, resume, micro batch, mistakes."""

from __future__ import annotations

import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pyarrow
import pytest
import twin
from closeness import distance
from kills import state
from launch import Launcher, start_ranks
from pictures import write_pictures
from pyarrow import parquet
from twin import losses, train
from waiting import until

from fd_large.cli.plan_workload import workload
from fd_large.recipes.run import Run


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 19)


def read(path: Path) -> Any:
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def reference(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three epochs of two steps under the deepspeed command."""
    run_dir = tmp_path_factory.mktemp("runs") / "reference"
    train(pictures, run_dir, "--optim.epochs", "3", *twin.WITH_LOADERS, launcher="deepspeed")
    return run_dir


def test_a_run_leaves_its_folder(reference: Path) -> None:
    assert len(losses(reference)) == 6
    summary = read(reference / "summary.json")
    assert summary["status"] == "done"
    assert summary["teacher"] == {"model": "swinv2_giant", "source": "random"}
    assert summary["loss_start"] == losses(reference)[0]
    assert read(reference / "environment.json")["launcher"] == "deepspeed"
    assert "auto" not in json.dumps(read(reference / "deepspeed.json"))
    assert read(reference / "recipe.json")["student"]["model"] == "swinv2_giant"
    assert sorted(p.name for p in (reference / "checkpoints").iterdir()) == [
        "step_00000004",
        "step_00000006",
    ]
    manifest = read(reference / "checkpoints/step_00000006/manifest.json")
    assert manifest["teacher_source"] == "random"
    assert len(manifest["teacher_hash"]) == 16
    run = Run.from_dict(read(reference / "recipe.json"))
    # Masters and moments in float32, and nothing of the teacher.
    stored = sum(tensor.nbytes for tensor in state(reference, 6).values())
    assert stored == 12 * sum(workload(run).student_sizes)
    log = (reference / "logs/rank_00000.log").read_text()
    assert "AdamW of torch" in log
    assert "whole on every rank" in log


@pytest.mark.parametrize("launcher", ["torchrun", pytest.param("mpirun", marks=pytest.mark.sweep)])
def test_the_same_losses_under_every_launcher(
    launcher: Launcher, pictures: Path, reference: Path, tmp_path: Path
) -> None:
    train(pictures, tmp_path / "run", "--optim.epochs", "3", launcher=launcher)
    assert losses(tmp_path / "run") == losses(reference)
    assert read(tmp_path / "run/environment.json")["launcher"] == launcher


@pytest.mark.closeness
def test_parquet_files_give_the_same_run_and_numbers_on_one_rank_and_on_two(
    pictures: Path, tmp_path: Path
) -> None:
    """Seven views over one and two ranks: one rank has a view more than the other."""
    cells = [{"bytes": path.read_bytes()} for path in sorted(pictures.iterdir())]
    table = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.table({"image": cells}), table, row_group_size=4)
    rows = []
    for ranks in (1, 2):
        run_dir = tmp_path / str(ranks)
        words = ("--optim.max_steps", "3", "--data.cache", str(tmp_path / f"blocks-{ranks}"))
        held_out = ("--eval.root", str(table), "--eval.views", "7")
        train(table, run_dir, *words, *held_out, ranks=ranks)
        lines = (run_dir / "evaluations.jsonl").read_text().splitlines()
        rows.append([json.loads(line) for line in lines])
        summary = read(run_dir / "summary.json")
        assert 0 < summary["held_out_loss"] < summary["held_out_loss_start"]
    # The images are the same to the bit (test_data_order.py); sums in another order are not.
    assert distance(losses(tmp_path / "1"), losses(tmp_path / "2")) <= 1e-6
    for alone, shared in zip(*rows, strict=True):
        assert alone.keys() == shared.keys()
        for name, value in alone.items():
            assert shared[name] == pytest.approx(value, rel=1e-4, abs=1e-5), name
    first, last = rows[0]
    assert first["held_out_loss"] == pytest.approx(first["unseen_crops_loss"]), "the same images"
    assert {"held_out_best_constant", "held_out_cosine"} <= last.keys()


def test_resumes_at_the_last_checkpoint_and_knows_when_it_is_done(
    pictures: Path, reference: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    shutil.copytree(reference, run_dir)
    shutil.rmtree(run_dir / "checkpoints/step_00000006")
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"update": 6, "lo')  # torn
    # Only what cannot change the result may differ from the first command.
    words = ("--data.workers", "0", "--runtime.save_minutes", "1e-6")
    train(pictures, run_dir, "--optim.epochs", "3", *words)
    assert losses(run_dir) == losses(reference)
    assert (run_dir / "checkpoints/step_00000005").is_dir(), "by the clock, in mid-epoch"
    again = train(pictures, run_dir, "--optim.epochs", "3", ranks=1, check=False)
    assert again.returncodes == [0]
    assert "nothing to do" in again.outputs[0]
    other = train(pictures, run_dir, "--optim.epochs", "2", check=False)
    assert other.returncodes == [2, 2]
    assert "optim.epochs 3 -> 2" in other.outputs[0]
    assert "--fresh" in other.outputs[0]


def test_auto_micro_batch_trains_like_a_given_one_and_is_remembered(
    pictures: Path, tmp_path: Path
) -> None:
    """Also without any compiler on the PATH, and with offload."""
    words = ("--optim.max_steps", "3")
    bare = {"PATH": str(_empty_folder(tmp_path)), "CC": "", "CXX": ""}
    auto = ("--batch.global_batch_size", "8", "--batch.micro_batch_size", "auto")
    train(
        pictures, tmp_path / "auto", *words, *auto, env=bare, config="zero3_offload", forked=False
    )
    found = read(tmp_path / "auto/micro_batch.json")
    assert found["micro_batch_size"] == 4
    assert found["setting"]["world_size"] == 2
    assert read(tmp_path / "auto/deepspeed.json")["gradient_accumulation_steps"] == 1
    given = ("--batch.global_batch_size", "8", "--batch.micro_batch_size", "4")
    train(pictures, tmp_path / "given", *words, *given, config="zero3_offload")
    assert losses(tmp_path / "auto") == losses(tmp_path / "given")
    # As of a run that was killed before it saved anything.
    shutil.rmtree(tmp_path / "auto/checkpoints")
    (tmp_path / "auto/summary.json").unlink()
    train(pictures, tmp_path / "auto", *words, *auto, config="zero3_offload")
    assert "peak" not in (tmp_path / "auto/logs/rank_00000.log").read_text().split("done:")[1]
    assert losses(tmp_path / "auto") == losses(tmp_path / "given")


def _empty_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "no_compiler_here"
    folder.mkdir()
    return folder


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--teacher.source", ""), "Set --teacher.source"),
        (("--teacher.source", "/no/such/file.pt"), "no such file"),
        (("--data.root", "/no/such/folder"), "no such file or folder"),
        (("--data.image_size", "72"), "window"),
        (
            (
                *("--teacher.architecture.patch_size", "8", "--objective.teacher_image_size", "0"),
                *("--objective.interpolation", "none"),
            ),
            "--objective.interpolation bilinear",
        ),
        (("--optim.base_rl", "1"), "nearest: --optim.base_lr"),
    ],
)
def test_a_mistake_is_one_sentence_before_anything_is_written(
    words: tuple[str, ...], said: str, pictures: Path, tmp_path: Path
) -> None:
    finished = train(pictures, tmp_path / "run", *words, ranks=1, check=False)
    assert finished.returncodes == [2]
    assert said in finished.outputs[0]
    assert "Traceback" not in finished.outputs[0]
    assert len([line for line in finished.outputs[0].splitlines() if "; got" in line]) <= 1
    assert not (tmp_path / "run").exists()


def test_only_one_rank_speaks_of_a_common_mistake(pictures: Path, tmp_path: Path) -> None:
    finished = train(pictures, tmp_path / "run", "--data.root", os.devnull, check=False)
    assert finished.returncodes == [2, 2]
    assert "".join(finished.outputs).count("no such folder") == 1


def test_forked_ranks_stop_by_a_signal_or_without_their_parent_and_go_on(
    pictures: Path, tmp_path: Path
) -> None:
    calm, run_dir = tmp_path / "calm", tmp_path / "run"
    more = ("--optim.max_steps", "40", *twin.WITH_LOADERS)
    train(pictures, calm, *more)
    rows, seen = run_dir / "metrics.jsonl", 0
    for number, code in ((signal.SIGTERM, 75), (signal.SIGKILL, -9)):
        words = twin.words(pictures, run_dir, *more)
        started = start_ranks(twin.TRAIN, *words, ranks=2, launcher="fd_large")
        try:
            started.until(
                lambda: rows.exists() and len(rows.read_text().splitlines()) > seen + 3  # noqa: B023
            )
            os.kill(started.processes[0].pid, number)
            assert started.processes[0].wait(60) == code
            until(lambda: not started.pids(), 60, lambda: "\n".join(started.outputs()))  # noqa: B023
        finally:
            outputs = started.kill()
        assert read(run_dir / "summary.json")["status"] == "preempted", outputs
        assert read(run_dir / "environment.json")["launcher"] == "python"
        seen = len(rows.read_text().splitlines())
    done = train(pictures, run_dir, *more, launcher="fd_large")
    assert f"resumed after step {seen} of 40" in done.outputs[0]
    assert losses(run_dir) == losses(calm)


def test_sigterm_to_the_command_ends_a_training_run(pictures: Path, tmp_path: Path) -> None:
    """In the middle of steps, collectives and loader workers."""
    run_dir = tmp_path / "run"
    words = twin.words(pictures, run_dir, "--optim.max_steps", "100000")
    started = start_ranks(twin.TRAIN, *words, ranks=2, launcher="deepspeed")
    try:
        rows = run_dir / "metrics.jsonl"
        started.until(lambda: rows.exists() and len(rows.read_text().splitlines()) > 3)
        os.kill(started.processes[0].pid, signal.SIGTERM)
        until(lambda: not started.pids(), 30, lambda: "\n".join(started.outputs()))
    finally:
        started.kill()
