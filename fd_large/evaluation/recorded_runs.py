"""Runs that a command trains by the dozen: what each is made of, and how it ended.

Each has a folder of its own and a record in it, written before it trains. So the same command goes
on where it stopped, and a folder that holds a run of anything else is refused.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fd_large import files
from fd_large.errors import ConfigError, Exit
from fd_large.files import out_folder, read_json, write_json
from fd_large.recipes.file_names import SUMMARY
from fd_large.recipes.run import Run, difference
from fd_large.tasks.registry import kind_of

# What two starts may have differently: it decides no score.
_FREE = frozenset({"data.cache", "data.cache_gb", "data.workers"})


def decides(field: str, task: str) -> bool:
    """Returns whether a field of a recipe may decide a score.

    Args:
        field: Its name, section.field.
        task: The recipe's `task.name`.
    """
    if field == "batch.micro_batch_size":
        return kind_of(task).depends_on_passes
    return field not in _FREE and (field == "runtime.seed" or not field.startswith("runtime."))


def train(
    run: Run, deepspeed_config: str, train_run: Callable[..., int]
) -> tuple[int, dict[str, Any]]:
    """Trains a run; returns the exit code and, where it is finished, its summary.json.

    A finished run gives 75 where it was asked to stop while it ended: others are not to follow.

    Args:
        run: The recipe.
        deepspeed_config: DeepSpeed's JSON, a name or a path.
        train_run: What trains it: (run, deepspeed_config=...) -> exit code.
    """
    from fd_large.engine.zero import start
    from fd_large.ranks import distributed
    from fd_large.runtime import preemption

    preemption.asked_too_late()  # What an earlier run was asked.
    try:
        code = train_run(run, deepspeed_config=deepspeed_config)
    finally:
        # Others follow in this process.
        start.forget_engines()
        gc.collect()
    if code:
        return code, {}
    # Rank 0 wrote it; the others may be here before it is written.
    file = Path(run.run_dir()) / SUMMARY
    summary = read_json(file, holds=dict) if distributed.is_main() else {}
    code = Exit.AGAIN if distributed.any_rank(preemption.asked_too_late()) else Exit.DONE
    return code, distributed.broadcast_object(summary)


def read_record(file: str, run: Run, inputs: Mapping[str, str], what: str) -> dict[str, Any]:
    """Returns the record of an earlier start; empty: there is none.

    Args:
        file: Its name in the run's folder.
        run: The recipe.
        inputs: What the recipe does not say: {"weights": a digest}.
        what: Words for such a run.

    Raises: ConfigError: if the folder holds a run of another recipe, or with other inputs.
    """
    path = Path(run.run_dir()) / file
    if not files.kind_of(path, where="--out"):
        return {}
    record = read_json(path, where="--out", holds=dict)
    found = difference(Run.from_dict(record.get("recipe", {})), run)
    found |= {name: (record.get(name), now) for name, now in inputs.items()}
    changed = "; ".join(
        f"{name} {was!r} -> {now!r}"
        for name, (was, now) in found.items()
        if was != now and decides(name, run.task.name)
    )
    if changed:
        raise ConfigError(
            f"{path.parent}: holds {what} of another recipe, other images or other weights; "
            f"got {changed}, expected the same. Set --out to another folder."
        )
    return record


def write_record(file: str, run: Run, inputs: Mapping[str, str], **outcome: Any) -> None:
    """Writes what a run is, and how it ended where that is known; makes its folder."""
    known = {"recipe": run.to_dict(), **inputs}
    write_json(out_folder(run.run_dir()) / file, {**known, **outcome})
