"""A signal or a file on one rank stops all of them, saved, in training, evaluation and saving."""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import twin
from kills import state, updates_done
from launch import Started
from pictures import write_pictures
from twin import losses, train

pytestmark = [pytest.mark.multirank, pytest.mark.slow]

UPDATES = 20


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_pictures(tmp_path_factory.mktemp("pictures"), 26)


def stop(
    pictures: Path,
    run_dir: Path,
    *words: str,
    when: Callable[[Started], bool],
    how: Callable[[Started], None],
) -> list[int]:
    """Starts the run, stops it, waits for its ranks; returns their exit codes."""
    started = twin.start(pictures, run_dir, *words)
    try:
        deadline = time.monotonic() + 120
        while not when(started):
            assert time.monotonic() < deadline, "\n".join(started.outputs())
            time.sleep(0.005)
        how(started)
        return [process.wait(timeout=60) for process in started.processes]
    finally:
        started.kill()


def stopped_at(run_dir: Path) -> int:
    """The update of the newest checkpoint, which is all that was trained."""
    newest = max(run_dir.glob("checkpoints/step_????????"))
    manifest = json.loads((newest / "manifest.json").read_text())
    assert manifest["update"] == len(losses(run_dir))
    return manifest["update"]


def status(run_dir: Path) -> str:
    return json.loads((run_dir / "summary.json").read_text())["status"]


def test_stopped_in_a_step_an_evaluation_and_a_save(pictures: Path, tmp_path: Path) -> None:
    """Three stops and three resumes end with the curve of the run that was left alone."""
    words = ("--optim.max_steps", str(UPDATES), "--eval.root", str(pictures))
    words += ("--eval.every", "10", "--eval.views", "64", "--runtime.save_every", "4")
    calm, run_dir = tmp_path / "calm", tmp_path / "run"
    train(pictures, calm, *words)

    def send(rank: int, number: int) -> Callable[[Started], None]:
        return lambda started: os.kill(started.processes[rank].pid, number)

    codes = stop(
        pictures,
        run_dir,
        *words,
        when=lambda started: updates_done(started) >= 3,
        how=send(1, signal.SIGTERM),
    )
    assert (codes, status(run_dir)) == ([75, 75], "preempted")
    first = stopped_at(run_dir)
    assert 3 <= first < 10

    # After update 10 the ranks evaluate; its line is the last that they say before.
    codes = stop(
        pictures,
        run_dir,
        *words,
        when=lambda started: "update 10/20" in "".join(started.outputs()),
        how=send(0, signal.SIGUSR1),
    )
    assert (codes, status(run_dir)) == ([75, 75], "preempted")
    assert stopped_at(run_dir) == 10, "it did not wait for the evaluation's end"
    rows = (run_dir / "evaluations.jsonl").read_text().splitlines()
    assert [json.loads(row)["update"] for row in rows] == [0]

    codes = stop(
        pictures,
        run_dir,
        *words,
        when=lambda _: bool(list(run_dir.glob("checkpoints/step_*16.part"))),
        how=lambda _: (run_dir / "stop").touch(),
    )
    assert (codes, status(run_dir)) == ([75, 75], "preempted")
    assert 16 <= stopped_at(run_dir) < UPDATES
    assert not (run_dir / "stop").exists()

    train(pictures, run_dir, *words)
    assert status(run_dir) == "done"
    assert losses(run_dir) == losses(calm)
    assert (run_dir / "evaluations.jsonl").read_text() == (calm / "evaluations.jsonl").read_text()
    alone, together = state(calm, UPDATES), state(run_dir, UPDATES)
    assert all((alone[key] == together[key]).all() for key in alone)
