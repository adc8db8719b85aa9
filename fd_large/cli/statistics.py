"""The command `fd-large statistics [RECIPE] OUT`, which measures a teacher's channels."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from fd_large.cli.arguments import AllowsCode, TakesRunFile, parse_with_recipe
from fd_large.cli.stopping import ending_with
from fd_large.cli.train import check_names
from fd_large.errors import ConfigError, nearest
from fd_large.files import check_out, out_folder
from fd_large.ranks import activity
from fd_large.recipes import registry
from fd_large.recipes.fields import at_least
from fd_large.recipes.run import Run

STOPPED = (
    "statistics: stopped before the end; got a signal, expected to measure all crops. Start the "
    "same command again: it measures all crops anew."
)


@dataclass(frozen=True, kw_only=True)
class Statistics(TakesRunFile, AllowsCode):
    """Measure statistics of a teacher's channels, which the normalisers standardise and phi_s need.

    The images are those of data.root. The command takes the recipe, the flags and the launcher of
    the run that will use the file, since a run refuses statistics of another teacher, layer or
    image size.
    """

    # Recipe of the run that will use the file (or --recipe NAME).
    recipe: Annotated[str, Positional, arg(metavar="[RECIPE]")] = registry.DEFAULT_RECIPE
    # File to which the statistics are written, in the format safetensors (or --out FILE).
    out: Annotated[str, Positional, arg(metavar="OUT")]
    # DeepSpeed's JSON: a name (zero1, zero2, zero3, zero3_hpz, ...) or a path.
    deepspeed_config: str
    # Target whose channels are measured. NAME: the map of the teacher NAME. NAME_summary: the
    # summary of that teacher. Empty: the map of the only teacher.
    target: str = ""
    # Number of random crops that are measured, 1 or more. All tokens of each crop's map are used.
    views: int = 4096

    def __post_init__(self) -> None:
        super().__post_init__()
        at_least("--views", self.views, 1, "crops")


def main(arguments: list[str]) -> int:
    """Writes the statistics of a teacher's channels to a file; returns the exit code."""
    parsed = parse_with_recipe(
        Statistics, arguments, command="statistics", recipe=registry.DEFAULT_RECIPE
    )
    options = parsed.own
    check_names(parsed.run, deepspeed_config=options.deepspeed_config)
    check_out(options.out, where="--out")
    with ending_with(STOPPED):
        measure(
            parsed.run,
            deepspeed_config=options.deepspeed_config,
            out=options.out,
            views=options.views,
            target=options.target,
        )
    from fd_large.ranks import distributed

    if distributed.is_main():
        print(f"{options.out}: {options.views} crops")
    return distributed.leave(0)


def measure(run: Run, *, deepspeed_config: str, out: str, views: int, target: str = "") -> None:
    """Writes mean, deviation and PHI-S rotation of a target's channels to the file `out`.

    Every rank has to call this function. `Statistics` describes the arguments; the labels of
    targets are `Target.label`.

    Raises: FDError: for the user's mistakes.
    """
    # Importing torch and deepspeed takes seconds.
    from fd_large.engine.opening import open_run
    from fd_large.ranks import distributed
    from fd_large.tasks.distillation import target_statistics
    from fd_large.tasks.distillation.held_out import Crops, HeldOutViews
    from fd_large.tasks.distillation.job import DistillationJob
    from fd_large.tasks.distillation.section import labels_of
    from fd_large.tasks.distillation.task import Distillation
    from fd_large.tasks.jobs import job_of

    if not isinstance(job_of(run), DistillationJob):
        raise ConfigError(
            f"--recipe: the recipe has no targets to measure; got the task {run.task.name}, "
            "expected a recipe of distillation. Choose such a recipe."
        )
    out_folder(Path(out).parent)
    entries = run.taught_by.items()
    labels = labels_of(run.taught_by)
    if target not in labels:
        names = [label for label in labels if label]
        expected = "expected no target, as the recipe has one teacher"
        remedy = "Leave out --target."
        if names:
            expected, remedy = nearest(target, names), "Name one of these."
        raise ConfigError(
            f"--target: no such target of this recipe; got {target!r}, {expected}. {remedy}"
        )
    raw = run.with_taught_by({name: entry.as_it_is() for name, entry in entries})
    opened = open_run(raw, job_of, deepspeed_config=deepspeed_config)
    assert isinstance(opened.job, DistillationJob)
    cut = Crops(
        opened.samples,
        views,
        opened.job.view_settings(),
        opened.run.runtime.seed,
        skip_bad=True,
    )
    crops = HeldOutViews("crops", cut, micro_batch_size=opened.micro_batch_size)
    mean, covariance = target_statistics.moments(
        crops.tokens(opened.engine, labels.index(target)), distributed.sum_tensor
    )
    if distributed.is_main():
        with activity.work("rotating"):
            task = opened.engine.task
            assert isinstance(task, Distillation)
            facts = opened.job.target_facts(task, task.targets[labels.index(target)])
            statistics = target_statistics.statistics_of(mean, covariance, facts)
        target_statistics.write(Path(out), statistics)
    distributed.barrier()
