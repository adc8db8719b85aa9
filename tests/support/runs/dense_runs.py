"""What is asked of every dense task in real processes: trained, killed and resumed, scored."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path

from closeness import distance
from kills import resumed_from, state, wait_for_steps
from launch import ROOT, Finished, run_ranks, start_ranks
from twin import TRAIN, losses

UPDATES = 5
# The student of the giant recipes, and how its twins run.
SMALL_GIANT = """
--student.architecture.embed_dim 16 --student.architecture.depths 1 1 2 1
--student.architecture.num_heads 1 1 2 4 --student.architecture.window_size 4
--student.architecture.extra_norm_every 2
--data.image_size 64 --data.workers 1 --runtime.log_every 1 --runtime.save_every 2
"""

Flags = Callable[..., list[str]]
"""Makes a command's arguments of (folder of the images, run folder, steps, ranks=...)."""


def flags_of(own: str, *, micro_batch_size: int | None = None) -> Flags:
    """Returns what makes the arguments of a command with these flags, four images a step.

    Args:
        own: The flags of every start.
        micro_batch_size: Images of a rank's pass; None: a step is one pass, for the batch norms.
    """

    def flags(root: Path, run_dir: Path, updates: int, *, ranks: int) -> list[str]:
        of_a_pass = str(micro_batch_size or 4 // ranks)
        return [
            *("--deepspeed_config", str(ROOT / "ds_configs/zero3.json"), *own.split()),
            *("--batch.global_batch_size", "4", "--batch.micro_batch_size", of_a_pass),
            *("--data.root", str(root), "--runtime.run_dir", str(run_dir)),
            *("--optim.max_steps", str(updates)),
        ]

    return flags


def train(flags: Flags, root: Path, run_dir: Path, *, ranks: int) -> Path:
    """Trains to the end; returns the run's folder."""
    run_ranks(TRAIN, *flags(root, run_dir, UPDATES, ranks=ranks), ranks=ranks, timeout=240)
    return run_dir


def check_one_process(flags: Flags, root: Path, calm: Path, run_dir: Path) -> Path:
    """Trains on one rank: the losses are those of the calm run, whose first step has no label.

    Returns: the run's folder.
    """
    alone, together = losses(train(flags, root, run_dir, ranks=1)), losses(calm)
    assert distance(together, alone) <= 1e-6
    assert alone[0] == 0 < min(alone[1:])
    return run_dir


def check_evaluations(
    run_dir: Path, root: Path, out: Path, *, metric: str, ranks: Sequence[int]
) -> list[Path]:
    """Scores a run on each number of ranks, of which the first one alone speaks.

    Returns: the folders of what was found, in `out`.
    """
    summary = json.loads((run_dir / "summary.json").read_text())
    assert summary[f"val_{metric}"] == scores_in(run_dir)[metric]
    folders = [out / str(number) for number in ranks]
    for folder, number in zip(folders, ranks, strict=True):
        first, *others = evaluate(run_dir, root, folder, ranks=number).outputs
        assert metric in first
        assert not any(metric.lower() in output.lower() for output in others)
    return folders


def check_kill_and_resume(
    flags: Flags, root: Path, calm: Path, run_dir: Path, program: Path = TRAIN
) -> list[str]:
    """Kills two ranks and lets them go on: losses and state are those of the calm run.

    Returns: the names of the tensors that were compared.
    """
    given = flags(root, run_dir, UPDATES, ranks=2)
    started = start_ranks(program, *given, ranks=2)
    try:
        wait_for_steps(started, 3, 180)
    finally:
        started.kill()
    again = start_ranks(program, *given, ranks=2)
    try:
        assert [process.wait(timeout=240) for process in again.processes] == [0, 0]
        assert 0 < resumed_from(again) < UPDATES
    finally:
        again.kill()
    assert losses(run_dir) == losses(calm)
    assert evaluations(run_dir) == evaluations(calm)
    first, second = state(calm, UPDATES), state(run_dir, UPDATES)
    assert first.keys() == second.keys()
    for name, values in first.items():
        assert values.equal(second[name]), name
    return list(first)


def evaluations(run_dir: Path) -> list[dict]:
    """The rows of evaluations.jsonl."""
    return [json.loads(row) for row in (run_dir / "evaluations.jsonl").read_text().splitlines()]


def scores(folder: Path) -> dict:
    """The scores of a test that is kept in a folder."""
    return json.loads((folder / "scores.json").read_text())


def scores_in(run_dir: Path) -> dict:
    """The scores of a run's last test."""
    return scores(run_dir / f"evaluations/update_{UPDATES:08d}")


def evaluate(run_dir: Path, root: Path, out: Path, *, ranks: int) -> Finished:
    """Scores a run."""
    return run_ranks(
        *(ROOT / "fd_large/__main__.py", "evaluate", run_dir),
        *("--data.root", root, "--out", out, "--data.workers", "0"),
        ranks=ranks,
    )


def predict(run_dir: Path, image: Path, out: Path) -> tuple[str, dict]:
    """Predicts an image; returns what is said, and what predictions.json holds of it."""
    finished = run_ranks(
        *(ROOT / "fd_large/__main__.py", "predict", run_dir, image, "--out", out), ranks=1
    )
    return finished.outputs[0], json.loads((out / "predictions.json").read_text())[str(image)]
