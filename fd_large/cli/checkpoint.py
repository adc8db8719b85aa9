"""`python -m fd_large checkpoint list|verify|prune|export|import`."""

from __future__ import annotations

from typing import Annotated

import tyro

from fd_large.checkpoint import inspection

RunDir = Annotated[str, tyro.conf.Positional]


def list_(run: RunDir) -> int:
    """List a run's complete checkpoints.

    Args:
        run: Folder of the run.
    """
    from rich.console import Console
    from rich.table import Table

    folder, found = inspection.stored_of(run)
    table = Table(title=f"{folder}", title_justify="left")
    for column in ("update", "samples", "ranks", "ZeRO", "size", "teacher's hash"):
        table.add_column(column, justify="right")
    for row in inspection.rows(found):
        table.add_row(
            str(row["update"]),
            f"{row['samples']:,}",
            str(row["ranks"]),
            str(row["zero"]),
            f"{row['bytes'] / 1e6:,.1f} MB",
            row["teacher"],
        )
    Console().print(table)
    return 0


def verify(run: RunDir) -> int:
    """Check every file of a run's checkpoints; exit code 1 if one is damaged.

    Args:
        run: Folder of the run.
    """
    folder, found = inspection.stored_of(run)
    unreadable = inspection.without_manifest(folder)
    problems = unreadable + inspection.verify_all(found)
    for problem in problems:
        print(f"damaged: {problem}")
    damaged = {problem.split(": ")[0] for problem in problems}
    whole = len(found) + len(unreadable)
    print(f"{whole - len(damaged)} of {whole} checkpoints are sound")
    return 1 if problems else 0


def prune(run: RunDir, keep_last: int | None = None) -> int:
    """Remove the checkpoints that the recipe does not keep.

    Args:
        run: Folder of the run.
        keep_last: Newest checkpoints that stay; by default the recipe's runtime.keep_last.
    """
    folder, _ = inspection.stored_of(run)
    removed = inspection.prune_run(folder, keep_last)
    print(f"removed {len(removed)}: {', '.join(path.name for path in removed) or 'nothing'}")
    return 0


def export(run: RunDir, out: RunDir, deepspeed_config: str) -> int:
    """Write the newest checkpoint in DeepSpeed's own format, for this number of ranks.

    Args:
        run: Folder of the run.
        out: Folder to write to.
        deepspeed_config: The DeepSpeed JSON whose stage the files are for.
    """
    from fd_large import distributed
    from fd_large.engine.deepspeed_checkpoints import export_checkpoint
    from fd_large.tasks.jobs import job_of

    updates = export_checkpoint(run, out, job_of, deepspeed_config=deepspeed_config)
    if distributed.is_main():
        print(f"update {updates}: {out}")
    return distributed.leave(0)


def import_(source: RunDir, run: RunDir, deepspeed_config: str) -> int:
    """Store a checkpoint of DeepSpeed's own format as a run's newest; as many ranks as wrote it.

    Args:
        source: The folder that DeepSpeed's save_checkpoint was given.
        run: Folder of the run, with its recipe.json.
        deepspeed_config: The DeepSpeed JSON that it was trained with.
    """
    from fd_large import distributed
    from fd_large.engine.deepspeed_checkpoints import import_checkpoint
    from fd_large.tasks.jobs import job_of

    updates = import_checkpoint(source, run, job_of, deepspeed_config=deepspeed_config)
    if distributed.is_main():
        print(f"update {updates}: {run}")
    return distributed.leave(0)


def main(arguments: list[str]) -> int:
    """Runs one of the commands."""
    return tyro.extras.subcommand_cli_from_dict(
        {"list": list_, "verify": verify, "prune": prune, "export": export, "import": import_},
        args=arguments or ["--help"],
        prog="python -m fd_large checkpoint",
        description="Checkpoints of a run.",
        use_underscores=True,
    )
