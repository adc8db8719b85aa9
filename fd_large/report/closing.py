"""What stands at the end of a run: the figures in words, and what to run next."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy

from fd_large.report.run_files import RunFiles
from fd_large.runtime.evaluation_names import SETS


def closing_text(files: RunFiles, pictures: list[Path]) -> str:
    """Returns the lines that a run ends with."""
    summary = files.summary
    lines = [_headline(files)]

    def add(what: str, told: str) -> None:
        lines.append(f"  {what:<16} {told}")

    if distils(files):
        add("teacher", _teacher(files.recipe["teacher"]))
    start, end = loss_ends(files)
    if start is not None:
        add("training", f"loss {start:.4f} -> {end:.4f}")
    for name, words in SETS.items():
        _, losses = files.evaluated(f"{name}_loss")
        _, constants = files.evaluated(f"{name}_best_constant")
        _, cosines = files.evaluated(f"{name}_cosine")
        if len(losses):
            told = f"loss {losses[0]:.4f} -> {losses[-1]:.4f}"
            if len(constants):
                ratio = losses[-1] / constants[-1]
                told += f", {ratio:.3f} of the best constant's {constants[-1]:.4f}"
            add(words, told)
        _, accuracies = files.evaluated(f"{name}_top1")
        if len(accuracies):
            add("", f"accuracy {accuracies[0]:.2f}% -> {accuracies[-1]:.2f}%")
        _, precisions = files.evaluated(f"{name}_AP")
        if len(precisions):
            _, at_half = files.evaluated(f"{name}_AP50")
            add(f"{words} AP", f"{100 * precisions[-1]:.1f}, AP50 {100 * at_half[-1]:.1f}")
        if len(cosines):
            add("", f"cosine {cosines[0]:z.2f} -> {cosines[-1]:z.2f}")
    if summary.get("images_per_second"):
        add("speed", f"{summary['images_per_second']:.1f} images/s on {_devices(summary)}")
    if summary.get("peak_memory_bytes"):
        add("peak memory", f"{summary['peak_memory_bytes'] / 1e9:.2f} GB on the fullest rank")
    for index, path in enumerate(pictures):
        add("" if index else "pictures", str(path))
    add("numbers, logs", f"{files.folder}/summary.json, metrics.jsonl, logs/")
    lines.append("next:")
    for step in next_steps(files):
        lines += [f"  {step['why']}:", f"    {step['command']}"]
    return "\n".join(lines)


def next_steps(files: RunFiles) -> list[dict[str, str]]:
    """Returns what is worth running after this run, as {"why", "command"}."""
    folder, recipe = files.folder, files.recipe
    elsewhere = ("--runtime.run_dir", f"{folder}-2")
    done = files.summary.get("status") == "done"
    steps = []
    if not done:
        steps.append(
            {
                "why": f"go on from the last checkpoint ({_progress(files)})",
                "command": _again(files, drop=()),
            }
        )
    if distils(files) and recipe["teacher"].get("source") == "random":
        steps.append(
            {
                "why": "the same with a teacher that knows something",
                "command": _again(
                    files,
                    drop=("teacher.source", "runtime.run_dir"),
                    more=("--teacher.source", "FILE", *elsewhere),
                ),
            }
        )
    elif done:
        steps.append(
            {
                "why": "the same on your own images",
                "command": _again(
                    files,
                    drop=("data.root", "runtime.run_dir"),
                    more=("--data.root", "FOLDER", *elsewhere),
                ),
            }
        )
    if done and _task(files) == "detection":
        steps.append(
            {
                "why": "what it sees in pictures of yours",
                "command": f"{_program('python')} -m fd_large predict {folder} IMAGE",
            }
        )
    steps += [
        {
            "why": "all curves in a browser",
            "command": f"{_program('tensorboard')} --logdir {folder}/events",
        },
        {
            "why": "the runs of record: what they need, how long they take, what to expect",
            "command": f"{_program('python')} -m fd_large recipes",
        },
    ]
    return steps


def distils(files: RunFiles) -> bool:
    """Whether the run learned from a teacher."""
    return _task(files) == "distillation"


def _task(files: RunFiles) -> str:
    return files.recipe.get("task", {}).get("name", "distillation")


def loss_ends(files: RunFiles) -> tuple[float | None, float | None]:
    """Returns the training loss of the first and of the last step that was not skipped."""
    losses = files.loss[numpy.isfinite(files.loss)]
    if len(losses) == 0:
        return None, None
    return float(losses[0]), float(losses[-1])


def _headline(files: RunFiles) -> str:
    name, folder = files.recipe["name"], files.folder
    status = files.summary.get("status")
    if status is None:
        return f"{name}: not finished, {_progress(files)}; {folder}"
    return f"{name}: {status}, {_progress(files)}; {folder}"


def _progress(files: RunFiles) -> str:
    done = int(files.updates[-1]) if len(files.updates) else 0
    total = files.summary.get("total_updates")
    return f"{done} of {total} steps" if total else f"{done} steps"


def _teacher(teacher: dict[str, Any]) -> str:
    if teacher.get("source") == "random":
        return f"{teacher['model']} with RANDOM weights: shows the machinery works, no more"
    return f"{teacher['model']} from {teacher.get('source') or 'no weights'}"


def _devices(summary: dict[str, Any]) -> str:
    count, kind = summary.get("world_size", 1), summary.get("device", "cpu")
    what = {"cuda": "GPU", "cpu": "CPU rank"}.get(kind, kind)
    return f"{count} {what}{'s' if count > 1 else ''}"


def _again(files: RunFiles, *, drop: tuple[str, ...], more: tuple[str, ...] = ()) -> str:
    """The command of the run once more, without some of its flags and with others."""
    launcher = [_program("deepspeed")]
    ranks = files.environment.get("world_size", 1)
    if files.environment.get("device") == "cpu" and ranks > 1:
        # Without GPUs the launcher cannot count what to start.
        launcher += ["--num_accelerators", str(ranks)]
    words = _options(files, drop=(*drop, "fresh"))
    return shlex.join([*launcher, "fd_large/train.py", *words, *more])


def _options(files: RunFiles, *, drop: tuple[str, ...]) -> list[str]:
    """The flags that the run was started with, without the launcher's own and those named."""
    flags: dict[str, list[str]] = {}
    words: list[str] = []
    for word in files.environment.get("command", [])[1:]:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            flags.pop(name, None)  # The last of two counts.
            words = flags.setdefault(name, [])
        words.append(word)
    kept = [word for name in flags if name not in (*drop, "local_rank") for word in flags[name]]
    return kept or ["--deepspeed_config", "ds_configs/zero3.json"]


def _program(name: str) -> str:
    """How to call a program of this environment from here: by name if that finds it."""
    beside = Path(sys.executable).parent / name
    found = shutil.which(name)
    if not beside.exists() or (found and Path(found).parent == beside.parent):
        return name
    relative = os.path.relpath(beside)
    return str(beside) if relative.startswith("..") else relative
