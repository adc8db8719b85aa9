"""One owner of a run's folder: second starts, a closed terminal, a start that comes back."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path

import pytest
import twin
from kills import updates_done, wait_for_steps
from launch import Started, start_ranks
from pictures import write_pictures
from twin import losses, train

from fd_large.checkpoint.store import complete

SHORT = (
    *("--student.architecture.depths", "1", "1", "--runtime.save_every", "1"),
    *twin.WITH_LOADERS,
)


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 26)


def signal_all(started: Started, number: signal.Signals) -> None:
    for process in started.processes:
        os.kill(process.pid, number)


def test_a_second_start_is_refused_and_a_closed_terminal_saves(
    pictures: Path, tmp_path: Path
) -> None:
    run_dir = tmp_path / "run"
    words = (*SHORT, "--optim.max_steps", "100000")
    first = twin.start(pictures, run_dir, *words)
    try:
        wait_for_steps(first, 1)
        inode = run_dir.stat().st_ino
        for ranks, more in ((2, ()), (1, ("--fresh",))):
            second = train(pictures, run_dir, *words, *more, ranks=ranks, check=False)
            assert second.returncodes == [2] * ranks, second.outputs
            said = "".join(second.outputs)
            assert said.count("another start owns this folder") == 1, said
            assert f"process {first.processes[0].pid}, since" in said
            assert "Traceback" not in said
        assert run_dir.stat().st_ino == inode, "moved away by --fresh"
        wait_for_steps(first, updates_done(first) + 2)
        signal_all(first, signal.SIGHUP)
        assert [process.wait() for process in first.processes] == [75, 75]
    finally:
        outputs = first.kill()
    assert "SIGHUP; the run saves and stops" in outputs[0]
    assert not (run_dir / "owner.json").exists()
    newest = max((run_dir / "checkpoints").iterdir()).name
    assert newest == f"step_{len(losses(run_dir)):08d}"
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary["status"] == "preempted"
    manifest = json.loads((run_dir / "checkpoints" / newest / "manifest.json").read_text())
    assert manifest["start"] == summary["start"]


def test_a_start_that_comes_back_finds_its_folder_taken(pictures: Path, tmp_path: Path) -> None:
    """As after a requeue, its node unreachable for a while: it writes nothing any more."""
    calm, run_dir = tmp_path / "calm", tmp_path / "run"
    words = (*SHORT, "--optim.max_steps", "24", "--runtime.keep_last", "21")
    train(pictures, calm, *words)
    old = start_ranks(
        twin.TRAIN, *twin.words(pictures, run_dir, *words), ranks=2,
        env={"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "0"},
    )  # fmt: skip
    new = None
    try:
        wait_for_steps(old, 3)
        signal_all(old, signal.SIGSTOP)
        new = start_ranks(
            twin.TRAIN, *twin.words(pictures, run_dir, *words), ranks=2,
            env={"SLURM_JOB_ID": "77", "SLURM_RESTART_COUNT": "1"},
        )  # fmt: skip
        wait_for_steps(new, 1)
        signal_all(old, signal.SIGCONT)
        assert old.processes[0].wait() == 3
        assert old.processes[1].wait() in (1, 3)
        assert [process.wait(240) for process in new.processes] == [0, 0]
    finally:
        said = old.kill()[0]
        told = new.kill()[0] if new else ""
    # Whichever comes first: the look at the owner's file, or a write that is refused.
    assert "no longer owns it" in said or "has a new owner" in said
    assert "Slurm has restarted job 77 since" in told
    assert losses(run_dir) == losses(calm)
    start = json.loads((run_dir / "summary.json").read_text())["start"]
    # Each complete one is of the start that made its steps. What the old start was writing when it
    # was told has its own name, ends in .part, and may lie there until the next start's sweep.
    starts = [stored.manifest["start"] for stored in complete(run_dir)]
    assert len(set(starts)) <= 2
    assert starts[-1] == start
    assert starts == sorted(starts, key=lambda one: one == start)
    assert not list(run_dir.glob(f"checkpoints/*{start}*"))
