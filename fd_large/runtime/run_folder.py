"""The folder of a run: what it is, where it ran, and whether this recipe belongs to it."""

from __future__ import annotations

import json
import logging
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from fd_large import distributed
from fd_large.errors import ConfigError
from fd_large.recipes.run import Run, difference

log = logging.getLogger(__name__)

PACKAGES = ("torch", "torchvision", "deepspeed", "timm", "numpy", "triton", "fairscale", "mpi4py")


def write_json(path: Path, value: Any) -> None:
    """Writes aside, flushes to disk, renames: a reader sees the old file or the new one."""
    aside = path.with_name(path.name + ".part")
    with aside.open("w") as file:
        json.dump(value, file, indent=1)
        file.write("\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)


@contextmanager
def written_or_told(what: object) -> Iterator[None]:
    """For files that a run can do without: a full disk is told, and training goes on."""
    try:
        yield
    except OSError as error:
        log.error("%s: NOT WRITTEN: %s", what, error)


def open_folder(run: Run, *, fresh: bool) -> Path:
    """Makes or enters the run's folder; rank 0 writes, the others follow.

    Args:
        run: The resolved recipe.
        fresh: Start over: the old run's files go to FOLDER.old-N, never away.

    Raises: ConfigError: if the folder belongs to another recipe; lists the fields that differ.
    """
    folder = Path(run.run_dir())
    problem = None
    if distributed.is_main():
        problem = _enter(folder, run, fresh)
    problem = distributed.broadcast_object(problem)
    if problem:
        raise ConfigError(problem)
    return folder


def write_environment(
    folder: Path, deepspeed_config: dict[str, Any], launcher: str, metrics: Mapping[str, str]
) -> None:
    """Records where and how the run is started, in environment.json and deepspeed.json.

    Rank 0 writes; the others return at once.

    Args:
        folder: The run's folder.
        deepspeed_config: The JSON that DeepSpeed got.
        launcher: What started the ranks.
        metrics: The words for what evaluations measure (`Job.metrics`), for the report.
    """
    if not distributed.is_main():
        return
    write_json(folder / "deepspeed.json", deepspeed_config)
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = None
    device = distributed.device()
    write_json(
        folder / "environment.json",
        {
            "python": sys.version.split()[0],
            "packages": versions,
            "commit": source_commit(),
            "host": platform.node(),
            "platform": platform.platform(),
            "device": device.type,
            "world_size": distributed.world_size(),
            "launcher": launcher,
            "command": sys.argv,
            "metrics": dict(metrics),
        },
    )


def _enter(folder: Path, run: Run, fresh: bool) -> str | None:
    """Enters or makes the folder on rank 0; returns the user's mistake, which all ranks raise."""
    try:
        return _enter_or_raise(folder, run, fresh)
    except OSError as error:
        return (
            f"--runtime.run_dir: cannot be used; got {error}, expected a folder that can be "
            "written. Choose another."
        )


def _enter_or_raise(folder: Path, run: Run, fresh: bool) -> str | None:
    recipe = folder / "recipe.json"
    if fresh and folder.exists() and any(folder.iterdir()):
        number = 1
        while (old := folder.with_name(f"{folder.name}.old-{number}")).exists():
            number += 1
        folder.rename(old)
    if recipe.exists():
        try:
            before = Run.from_dict(json.loads(recipe.read_text()))
        except (ValueError, ConfigError, AttributeError) as error:
            return (
                f"{recipe}: no recipe that this version can read; got {error}, expected what a run "
                "wrote. Set --runtime.run_dir to another folder, or --fresh to start over here."
            )
        changed = {
            name: pair for name, pair in difference(before, run).items() if name not in _MAY_CHANGE
        }
        if changed:
            fields = "; ".join(f"{name} {a!r} -> {b!r}" for name, (a, b) in changed.items())
            return (
                f"{folder}: holds a run of another recipe; got {fields}, expected the same. Set "
                "--runtime.run_dir to another folder, or --fresh to start over here."
            )
    folder.mkdir(parents=True, exist_ok=True)
    write_json(recipe, run.to_dict())
    return None


def status_of(folder: Path) -> str | None:
    """The status in summary.json, None where there is none."""
    with suppress(OSError, ValueError):
        summary = json.loads((folder / "summary.json").read_text())
        return summary.get("status") if isinstance(summary, dict) else None
    return None


# What may differ between the parts of one run without changing its result.
_MAY_CHANGE = {
    "batch.micro_batch_size",
    "data.max_bad_fraction",
    "data.root",
    "data.stage_to",
    "data.workers",
    "engine.node_size",
    "guard.enabled",
    "guard.roll_backs",
    "guard.skips",
    "guard.spread",
    "runtime.canary_every",
    "runtime.keep_every",
    "runtime.keep_last",
    "runtime.log_every",
    "runtime.max_failed_saves",
    "runtime.notice_seconds",
    "runtime.preemption",
    "runtime.run_dir",
    "runtime.save_every",
    "runtime.save_minutes",
    "runtime.watchdog_seconds",
    "student.activation_checkpointing",
    "student.attention_memory",
    "student.checkpoint_every",
    "teacher.placement",
}


def source_commit() -> str | None:
    """The commit of the source tree, or None where it is no checkout."""
    if shutil.which("git") is None:
        return None
    answer = subprocess.run(
        ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip() or None
