"""What stands at the end of a run: the figures in words, and what to run next."""

from __future__ import annotations

import os
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

from fd_large.report.run_files import RunFiles

RUNNING = "running"


def closing_text(files: RunFiles, pictures: list[Path]) -> str:
    """Returns the lines that a run ends with.

    Args:
        files: The run.
        pictures: What was drawn.
    """
    summary = files.summary
    rows = []
    rows += [(name, _frozen(name, section)) for name, section in files.frozen_models.items()]
    losses = files.trained_loss
    if len(losses):
        rows.append(("training loss", f"{losses[0]:.4f} -> {losses[-1]:.4f}"))
    for name in files.measured:
        _, values = files.evaluated(name)
        _, baseline = files.evaluated(f"{name.removesuffix('_loss')}_best_constant")
        text = " -> ".join(f"{value:z.4f}" for value in dict.fromkeys(values[[0, -1]]))
        if name.endswith("_loss") and len(baseline):
            ratio = values[-1] / baseline[-1]
            text += f", {ratio:.3f} of the constant-prediction baseline's {baseline[-1]:.4f}"
        if not name.endswith("_best_constant"):
            rows.append((files.words(name), text))
    if summary.get("images_per_second"):
        speed = f"{summary['images_per_second']:.1f} images/s on {_devices(summary)}"
        rows.append(("speed", speed))
    if summary.get("peak_memory_bytes"):
        memory = f"{summary['peak_memory_bytes'] / 1e9:.2f} GB on the fullest rank"
        rows.append(("peak memory", memory))
    rows += [("" if index else "pictures", str(path)) for index, path in enumerate(pictures)]
    kept = [name for name in ("summary.json", "metrics.jsonl", "logs") if files.has(name)]
    rows.append(("numbers, logs", f"{files.folder}: {', '.join(kept) or 'nothing yet'}"))
    if reason := summary.get("reason"):
        rows.append(("why it ended", reason))
    width = max(len(what) for what, _ in rows)
    status = summary.get("status") or "not finished"
    lines = [f"{files.recipe['name']}: {status}, {_progress(files)}; {files.folder}"]
    lines += [f"  {what:<{width}}  {text}" for what, text in rows]
    lines.append("next:")
    for step in next_steps(files):
        lines += [f"  {step['why']}:", f"    {step['command']}"]
    return "\n".join(lines)


def next_steps(files: RunFiles) -> list[dict[str, str]]:
    """Returns what is worth running after this run, as {"why", "command"}."""
    more: tuple[str, ...] = ()
    if files.summary.get("status") == "done":
        first = "the same on your own images"
        more = ("--data.root", "FOLDER", "--runtime.run_dir", f"{files.folder}-2")
    elif files.saved is not None:
        first = f"go on from the last checkpoint ({files.saved} steps)"
    else:
        first = "start again from the beginning: no checkpoint is stored yet"
    events = shlex.join([_program("tensorboard"), "--logdir", f"{files.folder}/events"])
    again = [{"why": first, "command": _again(files, more)}]
    return [
        *(again if files.summary.get("status") != RUNNING else ()),
        {"why": "all curves in a browser", "command": events},
        {
            "why": "the runs of record: what they need, how long they take, what to expect",
            "command": f"{_program('python')} -m fd_large recipes",
        },
    ]


def _progress(files: RunFiles) -> str:
    done = int(files.updates[-1]) if len(files.updates) else 0
    total = files.summary.get("total_updates")
    return f"{done} of {total} steps" if total else f"{done} steps"


def _frozen(name: str, section: dict[str, Any]) -> str:
    if section["source"] == "random":
        return (
            f"{section['model']} with RANDOM weights: shows the machinery works, no more; "
            f"give a real one with --{name}.source FILE"
        )
    return f"{section['model']} from {section['source']}"


def _devices(summary: dict[str, Any]) -> str:
    count, kind = summary.get("world_size", 1), summary.get("device", "cpu")
    what = {"cuda": "GPU", "cpu": "CPU rank"}.get(kind, kind)
    return f"{count} {what}{'s' if count > 1 else ''}"


def _again(files: RunFiles, more: tuple[str, ...]) -> str:
    """The command of the run once more, with other values of some of its flags."""
    launcher = [_program("deepspeed")]
    ranks = files.environment.get("world_size", 1)
    if files.environment.get("device") == "cpu" and ranks > 1:
        # Without GPUs the launcher cannot count what to start.
        launcher += ["--num_accelerators", str(ranks)]
    flags: dict[str, list[str]] = {}
    words: list[str] = []
    for word in files.environment.get("command", [])[1:]:
        if word.startswith("--"):
            name = word[2:].partition("=")[0].replace("-", "_")
            flags.pop(name, None)  # The last of two counts.
            words = flags.setdefault(name, [])
        words.append(word)
    # The launcher gives the first; the second would throw away what the run has done.
    left_out = {"local_rank", "fresh", *(word[2:] for word in more)}
    kept = [word for name in flags if name not in left_out for word in flags[name]]
    kept = kept or ["--deepspeed_config", "ds_configs/zero3.json"]
    return shlex.join([*launcher, "fd_large/train.py", *kept, *more])


def _program(name: str) -> str:
    """How to call a program of this environment from here: by name if that finds it."""
    beside = Path(sys.executable).parent / name
    found = shutil.which(name)
    if not beside.exists() or (found and Path(found).parent == beside.parent):
        return name
    relative = os.path.relpath(beside)
    return str(beside) if relative.startswith("..") else relative
