"""Checkpoints in DeepSpeed's own files, one folder a step, visible only when complete.

DeepSpeed writes `latest` before its closing barrier, so that it may name a folder that other ranks
are still writing; here all ranks write aside, and rank 0 renames after a barrier.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

from fd_large import distributed
from fd_large.errors import ConfigError

KEEP_LAST = 2


def save(engine: Any, folder: Path, update: int, state: dict[str, Any]) -> Path:
    """Writes the run's state after `update` updates; every rank must call it.

    Args:
        engine: The DeepSpeed engine of the trained task.
        folder: The run's folder.
        update: Finished updates.
        state: JSON-safe values that `load` returns: epoch, teacher's source and hash.
    """
    checkpoints = folder / "checkpoints"
    name = f"step_{update:08d}"
    aside, final = checkpoints / f"{name}.part", checkpoints / name
    if distributed.is_main():
        shutil.rmtree(aside, ignore_errors=True)
        aside.mkdir(parents=True)
    distributed.barrier()
    engine.save_checkpoint(str(aside), tag="state", save_latest=False)
    distributed.barrier()
    if distributed.is_main():
        manifest = {**state, "update": update, "world_size": distributed.world_size()}
        (aside / "manifest.json").write_text(json.dumps(manifest, indent=1) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        aside.rename(final)
        for old in stored(folder)[:-KEEP_LAST]:
            shutil.rmtree(old)
    distributed.barrier()
    return final


def stored(folder: Path) -> list[Path]:
    """Complete checkpoints, oldest first."""
    return sorted(
        path
        for path in (folder / "checkpoints").glob("step_*")
        if path.suffix != ".part" and (path / "manifest.json").is_file()
    )


def newest(folder: Path) -> dict[str, Any] | None:
    """The manifest of the newest checkpoint, the same on every rank, or None."""
    manifest = None
    if distributed.is_main() and (paths := stored(folder)):
        manifest = json.loads((paths[-1] / "manifest.json").read_text())
        manifest["path"] = str(paths[-1])
    return distributed.broadcast_object(manifest)


def load(engine: Any, manifest: dict[str, Any]) -> None:
    """Restores the engine from a checkpoint of the same number of ranks.

    Raises: ConfigError: if the number of ranks differs, which DeepSpeed's files do not allow.
    """
    if manifest["world_size"] != distributed.world_size():
        raise ConfigError(
            f"{manifest['path']}: written by another number of ranks; got "
            f"{distributed.world_size()}, expected {manifest['world_size']}. Start that many "
            "ranks, or --fresh."
        )
    engine.load_checkpoint(manifest["path"], tag="state")
