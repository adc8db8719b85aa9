"""The commands `checkpoint list|verify|prune RUN`, without torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fd_large.checkpoint import store
from fd_large.checkpoint.lease import Lease
from fd_large.errors import CheckpointError, ConfigError
from fd_large.files import read_json
from fd_large.ranks import activity
from fd_large.recipes.stored import recipe_file


def stored_of(run_dir: str) -> tuple[Path, list[store.Stored]]:
    """Returns the folder of a run and its complete checkpoints, oldest first.

    Raises: ConfigError: if the folder is no run or holds no checkpoint.
    """
    folder = Path(run_dir)
    recipe_file(folder, where="checkpoint")
    found = store.complete(folder)
    if not found:
        damaged = "; ".join(without_manifest(folder))
        raise ConfigError(
            f"checkpoint: {run_dir}: nothing that can be read is stored; got "
            f"{damaged or 'no complete checkpoint'}, expected one. "
            f"{'Restore its files' if damaged else 'Train the run first'}."
        )
    return folder, found


def rows(found: list[store.Stored]) -> list[dict[str, Any]]:
    """Returns what `list` shows of each checkpoint."""
    return [
        {
            "path": item.path.resolve(),
            "update": item.update,
            "samples": item.manifest["samples"],
            "ranks": item.manifest["world_size"],
            "zero": item.manifest["zero_stage"],
            "bytes": item.bytes,
            # The teacher's hash is one of them.
            "hashes": {k: v for k, v in item.manifest.items() if k.endswith("_hash")},
        }
        for item in found
    ]


def verify_all(found: list[store.Stored]) -> list[str]:
    """Returns every damage of the checkpoints, each naming its file."""
    items = activity.counted(found, "reading every byte", "checkpoints")
    return [f"{item.path}: {problem}" for item in items for problem in store.verify(item)]


def without_manifest(folder: Path) -> list[str]:
    """Returns a complaint for each checkpoint without a sound manifest, which cannot be read."""
    return [
        f"{path}: manifest.json is missing or damaged"
        for path in store.renamed(folder)
        if store.manifest_of(path) is None
    ]


def prune_run(folder: Path, keep_last: int | None, lease: Lease) -> list[Path]:
    """Removes what the recipe (or `keep_last`) does not keep; returns the removed folders.

    Raises: CheckpointError: if the newest that would stay is damaged.
    """
    path = recipe_file(folder, where="checkpoint prune")
    stored = read_json(path, where="checkpoint prune", holds=dict, remedy="Restore it.")
    runtime = stored.get("runtime")
    kept = runtime if isinstance(runtime, dict) else {}
    last, every = kept.get("keep_last"), kept.get("keep_every")
    if not isinstance(last, int) or not isinstance(every, int):
        raise ConfigError(
            f"checkpoint prune: {path}: damaged; got keep_last {last!r} and keep_every {every!r} "
            "of runtime, expected what the run wrote. Restore it."
        )
    keep = last if keep_last is None else keep_last
    if keep < 1:
        raise ConfigError(
            f"checkpoint prune: --keep_last: nothing would stay; got {keep}, expected 1 or more. "
            "Remove the run's folder by hand if that is meant."
        )
    newest = store.complete(folder)[-1]
    problems = store.verify(newest)
    if problems:
        raise CheckpointError(
            f"checkpoint prune: the newest is damaged; got {newest.path}: {problems[0]}, expected "
            "a sound one. Remove that folder by hand, then prune."
        )
    return store.prune(folder, keep_last=keep, keep_every=every, lease=lease)
