"""The command `fd-large checkpoint`: list, verify, prune, export and import checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from fd_large.checkpoint import store
from fd_large.checkpoint.lease import Lease, claimed
from fd_large.cli.arguments import AllowsCode, call_subcommand
from fd_large.cli.output import tables
from fd_large.cli.ownership import owning
from fd_large.engine.zero.config import load
from fd_large.errors import CheckpointError, ConfigError
from fd_large.files import check_out, kind_of, read_json
from fd_large.ranks import activity
from fd_large.recipes.stored import recipe_file

# DeepSpeed's name of the file that names its newest checkpoint.
LATEST = "latest"


@dataclass(frozen=True, kw_only=True)
class _OfRun:
    # Folder of the run, for example runs/quickstart.
    run: Annotated[str, Positional, arg(metavar="RUN")]


class List(_OfRun):
    """List a run's complete checkpoints."""


class Verify(_OfRun):
    """Check every file of a run's checkpoints; exit code 1 if a checkpoint is damaged."""


@dataclass(frozen=True, kw_only=True)
class Prune(_OfRun):
    """Remove the checkpoints that the recipe does not keep."""

    # Number of newest checkpoints that are kept. None: the recipe's runtime.keep_last.
    keep_last: int | None = None


@dataclass(frozen=True, kw_only=True)
class Export(_OfRun, AllowsCode):
    """Write the newest checkpoint in DeepSpeed's format, for as many ranks as run the command."""

    # Folder to write to.
    out: Annotated[str, Positional, arg(metavar="OUT")]
    # DeepSpeed's JSON, a path or a name, which decides the ZeRO stage of the written checkpoint.
    deepspeed_config: str


@dataclass(frozen=True, kw_only=True)
class Import(AllowsCode):
    """Store a checkpoint of DeepSpeed as the newest of a run; needs as many ranks as wrote it."""

    # Folder to which DeepSpeed's save_checkpoint wrote the checkpoint.
    source: Annotated[str, Positional, arg(metavar="SOURCE")]
    # Folder of the run, with its recipe.json.
    run: Annotated[str, Positional, arg(metavar="RUN")]
    # DeepSpeed's JSON of the training that wrote the checkpoint, a path or a name.
    deepspeed_config: str


def stored_of(run: str) -> tuple[Path, list[store.Stored]]:
    """Returns the path `run`, a run's folder, and the run's complete checkpoints, oldest first.

    Raises: ConfigError: if the folder is not a run's, or holds no complete checkpoint.
    """
    folder = Path(run)
    recipe_file(folder, where="checkpoint")
    checkpoints = store.complete(folder)
    if not checkpoints:
        damaged = "; ".join(_without_manifest(folder))
        raise ConfigError(
            f"checkpoint: {run}: no readable checkpoint; got "
            f"{damaged or 'no complete checkpoint'}, expected a readable one. "
            f"{'Restore the files' if damaged else 'Train the run first'}."
        )
    return folder, checkpoints


def _without_manifest(folder: Path) -> list[str]:
    """Returns a message for each checkpoint of a run whose manifest.json is missing or damaged."""
    return [
        f"{path}: manifest.json is missing or damaged"
        for path in store.renamed(folder)
        if store.manifest_of(path) is None
    ]


def list_checkpoints(run: str) -> int:
    """Prints a table of the complete checkpoints of the run in the folder `run`; returns 0.

    A line below the table names each checkpoint whose manifest.json is missing or damaged.
    """
    from rich.table import Table

    folder, checkpoints = stored_of(run)
    table = Table(title=f"{folder}", title_justify="left")
    best, manifests = store.best_of(folder), [item.manifest for item in checkpoints]
    # The teacher's hash is one of them.
    named = (name for manifest in manifests for name in manifest if name.endswith("_hash"))
    hashes = list(dict.fromkeys(named))
    titles = [name.replace("_", " ") for name in hashes]
    for column in ("step", "samples", "ranks", "ZeRO", "size", *titles):
        table.add_column(column, justify="right")
    for item, manifest in zip(checkpoints, manifests, strict=True):
        table.add_row(
            f"best  {item.update}" if best == item.path.resolve() else str(item.update),
            f"{manifest['samples']:,}",
            str(manifest["world_size"]),
            str(manifest["zero_stage"]),
            f"{item.bytes / 1e6:,.1f} MB",
            *(manifest.get(name, "none") for name in hashes),
        )
    if any((m["zero_stage"], m["world_size"]) == (0, 1) for m in manifests):
        table.caption = "ZeRO 0: with one rank in float32, stages 1 and 2 have nothing to shard."
        table.caption_justify = "left"
    tables().print(table)
    for problem in _without_manifest(folder):
        print(f"damaged: {problem}")
    return 0


def verify(run: str) -> int:
    """Checks every file of the checkpoints of a run; returns 1 if one is damaged, else 0."""
    folder, checkpoints = stored_of(run)
    unreadable = _without_manifest(folder)
    read = activity.counted(checkpoints, "reading every byte", "checkpoints")
    damages = [f"{item.path}: {damage}" for item in read for damage in store.verify(item)]
    problems = unreadable + damages
    for problem in problems:
        print(f"damaged: {problem}")
    damaged = {problem.split(": ")[0] for problem in problems}
    whole = len(checkpoints) + len(unreadable)
    print(f"{whole - len(damaged)} of {whole} checkpoints are sound")
    return 1 if problems else 0


def prune(run: str, keep_last: int | None) -> int:
    """Removes the checkpoints that the recipe does not keep, and prints their names; returns 0.

    `Prune` describes `keep_last`.
    """
    folder, _ = stored_of(run)
    with claimed(folder) as lease:
        removed = _pruned(folder, keep_last, lease)
    print(f"removed {len(removed)}: {', '.join(path.name for path in removed) or 'nothing'}")
    return 0


def _pruned(folder: Path, keep_last: int | None, lease: Lease) -> list[Path]:
    """Removes the checkpoints that the recipe does not keep; returns their folders.

    Raises:
        ConfigError: If recipe.json is damaged, or no checkpoint would be kept.
        CheckpointError: If the newest checkpoint is damaged.
    """
    path = recipe_file(folder, where="checkpoint prune")
    stored = read_json(path, where="checkpoint prune", holds=dict, remedy="Restore it.")
    runtime = stored.get("runtime")
    settings = runtime if isinstance(runtime, dict) else {}
    last, every = settings.get("keep_last"), settings.get("keep_every")
    if not isinstance(last, int) or not isinstance(every, int):
        raise ConfigError(
            f"checkpoint prune: {path}: damaged; got runtime.keep_last {last!r} and "
            f"runtime.keep_every {every!r}, expected whole numbers. Restore the file."
        )
    keep = last if keep_last is None else keep_last
    if keep < 1:
        raise ConfigError(
            f"checkpoint prune: --keep_last: no checkpoint would stay; got {keep}, expected 1 or "
            "more. To remove all checkpoints, delete the run's folder."
        )
    newest = store.complete(folder)[-1]
    if problems := store.verify(newest):
        raise CheckpointError(
            f"checkpoint prune: the newest checkpoint is damaged; got {newest.path}: "
            f"{problems[0]}, expected a sound one. Remove that folder by hand, then prune."
        )
    return store.prune(folder, keep_last=keep, keep_every=every, lease=lease)


def export(run: str, out: str, deepspeed_config: str) -> int:
    """Writes a run's newest checkpoint in DeepSpeed's format; returns the exit code.

    Every rank has to call this function. `Export` describes the arguments.
    """
    stored_of(run)
    check_out(out, where="checkpoint export", holds="folder")
    load(deepspeed_config)
    from fd_large.engine.deepspeed_checkpoints import export_checkpoint
    from fd_large.ranks import distributed
    from fd_large.tasks.jobs import job_of

    steps = export_checkpoint(run, out, job_of, deepspeed_config=deepspeed_config)
    if distributed.is_main():
        print(f"step {steps}: written to {out}")
    return distributed.leave(0)


def import_(source: str, run: str, deepspeed_config: str) -> int:
    """Stores a checkpoint of DeepSpeed's format as a run's newest; returns the exit code.

    Every rank has to call this function. `Import` describes the arguments.
    """
    recipe_file(Path(run), where="checkpoint import")
    load(deepspeed_config)
    if kind_of(Path(source) / LATEST, where="checkpoint import") != "file":
        raise CheckpointError(
            f"checkpoint import: {source}: not a DeepSpeed checkpoint; got a path without "
            f"{LATEST}, expected the folder given to save_checkpoint. Name that folder."
        )
    with owning(run) as lease:
        from fd_large.engine.deepspeed_checkpoints import import_checkpoint
        from fd_large.ranks import distributed
        from fd_large.tasks.jobs import job_of

        steps = import_checkpoint(
            source, run, job_of, deepspeed_config=deepspeed_config, lease=lease
        )
    if distributed.is_main():
        print(f"step {steps}: imported into {run}")
    return distributed.leave(0)


def main(arguments: list[str]) -> int:
    """Runs the subcommand that the first argument names; returns the exit code."""
    commands: dict[str, tuple[type, Callable[..., int]]] = {
        "list": (List, list_checkpoints),
        "verify": (Verify, verify),
        "prune": (Prune, prune),
        "export": (Export, export),
        "import": (Import, import_),
    }
    return call_subcommand(arguments, commands, command="checkpoint")
