"""Stops a run at set moments, or kills it at random ones, and lets the same command go on."""

from __future__ import annotations

import json
import random
import re
import time
from pathlib import Path
from typing import Any

import torch
from launch import ROOT, Launcher, Started, read_results, run_ranks
from safetensors.torch import load_file
from twin import start


def state(run_dir: Path, update: int) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint, whole."""
    folder = run_dir / f"checkpoints/step_{update:08d}"
    parts: dict[str, list[torch.Tensor]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        for key, values in load_file(path).items():
            parts.setdefault(key, []).append(values)
    return {key: torch.cat(values) for key, values in parts.items()}


def stopped(
    words: list[str],
    folder: Path,
    stops: list[tuple[str, str, int, int]],
    *,
    ranks: int = 2,
    launcher: Launcher = "plain",
) -> tuple[list[int], list[list[dict[str, Any]]]]:
    """Starts a run once for each stop, by programs/preempted.py, which says what a stop is.

    Args:
        words: The command's arguments.
        folder: A new folder for what the ranks find.
        stops: Each with its moment, signal or file, rank, and the number of steps before it.
        ranks, launcher: See `run_ranks`.

    Returns: exit codes, and for each rank what it saw of each stop.
    """
    folder.mkdir()
    (folder / "stops.json").write_text(json.dumps(stops))
    finished = run_ranks(
        ROOT / "tests/integration/programs/preempted.py",
        *(folder, *words),
        ranks=ranks,
        launcher=launcher,
        timeout=240,
        check=False,
    )
    try:
        return finished.returncodes, read_results(folder, ranks)
    except FileNotFoundError:
        raise AssertionError("\n".join(finished.outputs)) from None


def updates_done(started: Started) -> int:
    """Steps that this start has finished, by its own words."""
    return len(re.findall(r"  step \d+/\d+  ", "".join(started.outputs())))


def wait_for_steps(started: Started, steps: int, seconds: float = 120.0) -> None:
    """Waits until a start has finished so many steps."""
    started.until(lambda: updates_done(started) >= steps, seconds)


def resumed_from(started: Started) -> int:
    """The step that this start went on from; 0 for the beginning."""
    text = "".join(started.outputs())
    return int(text.split("resumed after step ")[1].split()[0]) if "resumed after" in text else 0


def kill_and_resume(
    pictures: Path, run_dir: Path, kills: int, seed: int, *more: str, longest_rest: float = 2.0
) -> list[dict[str, Any]]:
    """Trains with kills at random moments of training, a third inside a save.

    Args:
        pictures: A folder of images.
        run_dir: The run's folder.
        kills: How often.
        seed: Seed of the random moments.
        more: Further arguments of the command.
        longest_rest: Seconds of training after a start's third step, at most.

    Returns: of each kill, whether the run was alive, whether a save was under way (a `.part` folder
        that was not there before this start's first step), whether all ranks were killed, and
        from which update this start had gone on.
    """
    draw = random.Random(seed)
    met = []
    for number in range(kills):
        inside_a_save, everyone = number % 3 == 0, draw.random() < 0.5
        started = start(pictures, run_dir, *more)
        try:
            deadline = time.monotonic() + 120

            def running(until: float = deadline, run: Started = started) -> bool:
                alive = all(process.poll() is None for process in run.processes)
                return alive and time.monotonic() < until

            # Leftovers of the last kill are swept before the first step; a save of each step is
            # complete after the third, however slow the steps are.
            while running() and updates_done(started) < 3:
                time.sleep(0.02)
            rest = draw.uniform(0.0, longest_rest)
            begin = time.monotonic()
            while running() and time.monotonic() < begin + rest:
                time.sleep(0.01)
            saving = False
            while inside_a_save and not saving and running():
                saving = bool(list(run_dir.glob("checkpoints/step_*.part/rank_*")))
            alive = running()
            victims = started.processes if everyone else [draw.choice(started.processes)]
            for process in victims:
                process.kill()
            met.append(
                {
                    "alive": alive,
                    "in a save": saving and alive,
                    "all": everyone,
                    "resumed from": resumed_from(started),
                }
            )
        finally:
            started.kill()
    return met
