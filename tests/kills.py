"""Kills a run at random moments and lets the same command go on."""

from __future__ import annotations

import os
import random
import signal
import time
from pathlib import Path

import torch
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


def kill_and_resume(
    pictures: Path, run_dir: Path, kills: int, seed: int, *more: str
) -> list[dict[str, object]]:
    """Trains with kills at random moments, a third inside a save; what each one met."""
    draw = random.Random(seed)
    met = []
    for number in range(kills):
        inside_a_save, everyone = number % 3 == 0, draw.random() < 0.5
        started = start(pictures, run_dir, *more)
        try:
            before = time.monotonic()
            while not list(run_dir.glob("metrics.jsonl")) and time.monotonic() < before + 60:
                time.sleep(0.02)
            time.sleep(draw.uniform(0.0, 4.0))
            parts: list[Path] = []
            while inside_a_save and not parts and time.monotonic() < before + 90:
                if all(process.poll() is not None for process in started.processes):
                    break
                parts = list(run_dir.glob("checkpoints/*.part"))
            victims = started.processes if everyone else [draw.choice(started.processes)]
            alive = any(process.poll() is None for process in started.processes)
            for process in victims:
                if process.poll() is None:
                    os.kill(process.pid, signal.SIGKILL)
            met.append({"in a save": bool(parts), "alive": alive, "all": everyone})
        finally:
            started.kill()
    return met
