"""Protocols that score a run by its own task, such as detection by COCO's metrics."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from fd_large.errors import ConfigError
from fd_large.evaluation.protocol import Protocol, Request, Result
from fd_large.recipes.fields import override
from fd_large.recipes.file_names import PAGE
from fd_large.recipes.stored import read_recipe, run_of_checkpoint
from fd_large.recipes.task_kind import TaskKind

_FIELDS = ("data.root", "data.workers", "data.max_pixels")


@dataclass(frozen=True, kw_only=True)
class _NoFlags:
    """Dataclass without flags, since a run's own settings decide its scores."""


def scored_by(kind: TaskKind) -> Protocol:
    """Returns the protocol that scores a run of the task `kind` by the task's own metrics."""
    return Protocol(
        name=kind.name,
        title=kind.title or kind.name,
        measure=_measure,
        flags=_NoFlags,
        fields=(*_FIELDS, *kind.scoring_fields),
    )


def _measure(request: Request) -> Result:
    """Scores the requested run, with the images divided among all ranks.

    Raises: ConfigError: if several runs are named.
    """
    models = request.flags.models
    if len(models) > 1:
        raise ConfigError(
            f"evaluate: only one run at a time can be scored; got {' '.join(models)}, expected a "
            "single run. Name one run."
        )
    path, changes = Path(models[0]), request.changes
    run = override(read_recipe(run_of_checkpoint(path), where="evaluate"), changes)
    if "data.root" in changes:  # The val split of the given dataset, not the run's own test images.
        run = override(run, {"eval.root": "", "data.val_fraction": 0.0})
    # Importing torch takes seconds.
    from fd_large.checkpoint import stream
    from fd_large.kernels.precision import full_float32
    from fd_large.ranks import distributed
    from fd_large.report.evaluation_page import write_evaluation_page
    from fd_large.runtime import logs
    from fd_large.tasks.jobs import job_of, stored_run_of

    logs.start(distributed.start().rank)
    full_float32(distributed.device())
    reader = stream.newest_of_main(path, where="evaluate")
    out = Path(request.flags.out)
    scores = stored_run_of(job_of(run)).score(reader, out)
    files = [*scores.files]
    if distributed.is_main():
        pictures = [file for file in files if file.suffix == ".png"]
        title = f"{run.name}: {request.protocol.title}"
        page = write_evaluation_page(out / PAGE, title, scores.tables, pictures, below=str(path))
        files.append(page)
    return Result(scores.tables, files)
