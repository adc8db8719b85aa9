"""The command `fd-large cache [RECIPE] OUT`, which stores the maps of a recipe's teachers."""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from tyro.conf import Positional, arg

from fd_large.cli.arguments import AllowsCode, TakesRunFile, parse_with_recipe
from fd_large.cli.output import size, tables
from fd_large.cli.paths import paths_of, require_paths, require_sources
from fd_large.cli.stopping import ending_with
from fd_large.files import check_out, kind_of
from fd_large.plan.cached_targets import SECONDS_TOLERANCE, CachedTargets
from fd_large.plan.rates import rates_of
from fd_large.ranks.activity import clock
from fd_large.ranks.processes import check_workers
from fd_large.recipes import registry
from fd_large.recipes.fields import at_least, positive, require
from fd_large.recipes.run import Run
from fd_large.tasks.distillation.section import CACHED, check_storable, source_flag

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, kw_only=True)
class Cache(TakesRunFile, AllowsCode):
    """Store the maps of a recipe's teachers for fixed views of data.root.

    Runs with --teacher.source cached:OUT then learn from the stored maps, without the teachers. The
    command takes the flags and the launcher of a run. If the command is started again, it continues
    where it stopped, on any number of ranks. If eval.root is set, it also stores the maps of the
    views of the held-out images.
    """

    # Recipe of the runs that are to use the maps (or --recipe NAME).
    recipe: Annotated[str, Positional, arg(metavar="[RECIPE]")] = registry.DEFAULT_RECIPE
    # Folder to which the maps are written (or --out FOLDER). If there are several teachers, each
    # has a subfolder with its name.
    out: Annotated[str, Positional, arg(metavar="OUT")]
    # Number of views of each image that are stored. A view is a random crop, flipped or not; the
    # epochs of a run use the views in turn. 0: the recipe's task.distillation.views, or 1 if that
    # is 0.
    views: int = 0
    # Number format of the stored maps. fp32: exact. fp16, fp8 (E4M3) and int8: rounded, with an
    # offset and a scale for each token (docs/cache.md lists the errors).
    precision: Literal["fp32", "fp16", "fp8", "int8"] = "fp8"
    # Print the costs of storing, and whether storing saves time, and write nothing.
    plan: bool = False
    # GPU model for --plan: h100, h200, b200, a100, a100_40 or l40s.
    gpu: str = "h100"
    # Rate at which each rank of a run reads the cache, in GB/s, for --plan.
    read_gb: float = 1.0
    # Number of runs that are to use the maps, for --plan.
    runs: int = 1
    # Number of images, for --plan. 0: the number of images in data.root.
    images: int = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        rates_of(self.gpu)
        at_least("--views", self.views, 0, "views")
        at_least("--runs", self.runs, 1, "runs")
        at_least("--images", self.images, 0, "images")
        positive("--read_gb", self.read_gb)


def main(arguments: list[str]) -> int:
    """Stores the maps of a recipe's teachers, prints a line for each, and returns the exit code.

    With --plan it only prints the costs.
    """
    parsed = parse_with_recipe(Cache, arguments, command="cache", recipe=registry.DEFAULT_RECIPE)
    options = parsed.own
    run = _with_views(parsed.run, options.views)
    require_paths(paths_of(run))
    if options.plan:
        tables().print(plan(run, options))
        return 0
    check_workers(run.data.workers)
    require_sources(run)
    check_out(options.out, where="cache", holds="folder")
    with ending_with(STOPPED):
        written = write(run, options.out, precision=options.precision)
    from fd_large.ranks import distributed

    if distributed.is_main():
        for name, count in written.items():
            folder = Path(options.out, name)
            source = f"{source_flag(name)} {CACHED}{folder}"
            print(f"{folder}: {count:,} maps written; train with {source}")
    return distributed.leave(0)


# Complete records stay and the others are written again, so the command may stop at any time.
STOPPED = (
    "cache: stopped before the end; got a signal, expected to store all maps. Stored maps are "
    "kept. Start the same command again to store the rest."
)


def _with_views(run: Run, views: int) -> Run:
    """Returns the recipe with `task.distillation.views`, the number of stored views of an image.

    This is `views`; or if that is 0 the recipe's own number; or if that is 0, too, one view.

    Raises: ConfigError: if the recipe has no teacher, or its maps cannot be stored.
    """
    require(
        bool(run.frozen_models),
        "cache: the recipe has no teacher whose maps could be stored",
        f"{run.name} of the task {run.task.name}",
        "a recipe of distillation",
        "Choose such a recipe",
    )
    mosaics = {name: entry.mosaic for name, entry in run.taught_by.items()}
    check_storable(run.data.image_sizes, mosaics)
    distillation = run.task.distillation
    settings = replace(distillation, views=views or distillation.views or 1)
    return replace(run, task=replace(run.task, **{"distillation": settings}))


def write(run: Run, out: str, *, precision: str) -> dict[str, int]:
    """Writes the maps of a recipe's teachers that are not stored yet to the folder `out`.

    Every rank has to call this function. The recipe's section task.distillation defines the views;
    `Cache` describes the other arguments.

    Returns: the number of maps that this call wrote, by the teacher's name.
    Raises: FDError: for the user's mistakes.
    """
    # Importing torch and deepspeed takes seconds.
    from fd_large.engine.opening import open_frozen
    from fd_large.tasks.distillation.cached.caches import held_out_views, held_out_writer
    from fd_large.tasks.distillation.cached.write import CacheWriter, header_of, write_cache
    from fd_large.tasks.distillation.job import DistillationJob
    from fd_large.tasks.jobs import job_of

    job, samples = open_frozen(run, job_of)
    assert isinstance(job, DistillationJob)
    run, settings, caches = job.run, job.view_settings(), job.caches
    facts, views = caches.facts(samples), caches.views_to_store(samples)
    written = {}
    for name, teacher in job.placed.items():
        folder, entry = Path(out, name), run.taught_by[name]
        to_write = [
            (CacheWriter(folder, header_of(teacher, entry, facts, precision=precision)), views)
        ]
        if run.eval.root:
            crops = job.held_out(samples)
            writer = held_out_writer(folder, teacher, entry, crops, settings, precision=precision)
            to_write.append((writer, held_out_views(crops, settings, views.batch_size)))
        written[name] = sum(
            write_cache(
                writer,
                teacher,
                images,
                workers=run.data.workers,
                max_bad_fraction=run.data.max_bad_fraction,
                where="OUT",
            )
            for writer, images in to_write
        )
    return written


def plan(run: Run, options: Cache) -> Table:
    """Returns a table of the costs of storing the teachers' maps, and of the time saved.

    The recipe's section task.distillation defines the views.

    Raises: FDError: if the models cannot be built, or the images cannot be opened.
    """
    from rich.table import Table

    from fd_large.cli.cache_costs import costs_of, micro_batch_of
    from fd_large.cli.plan import as_counted
    from fd_large.cli.plan_workload import workload
    from fd_large.engine.checkpoint_models import sources_of
    from fd_large.tasks.distillation.job import DistillationJob
    from fd_large.tasks.jobs import job_of

    rates = rates_of(options.gpu)
    load = workload(as_counted(run), rates)
    job = job_of(job_of(run).settle(sources_of(job_of)))
    assert isinstance(job, DistillationJob)
    costs = costs_of(
        job,
        load=load,
        rates=rates,
        images=options.images or len(job.open_samples()),
        precision=options.precision,
        runs=options.runs,
        read_bytes_per_second=options.read_gb * 1e9,
    )
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(no_wrap=True)
    table.add_column()
    for name, cost in costs.items():
        if name:
            table.add_row(f"teacher {name}", "")
        for label, value in _rows(cost, options, micro_batch_of(job, load)):
            table.add_row(label, value)
    total = sum(cost.total_bytes for cost in costs.values())
    folder = next(path for path in Path(options.out).absolute().parents if kind_of(path))
    free = shutil.disk_usage(folder).free
    fits = "enough" if free >= total else f"TOO LITTLE: {size(total)} are needed"
    table.add_row("free disk", f"{size(free)} in {folder}: {fits}")
    return table


def _rows(cost: CachedTargets, options: Cache, micro_batch: int) -> list[tuple[str, str]]:
    """Returns the rows (label, text) of the table about one teacher's maps.

    Times were computed for forward passes of `micro_batch` images.
    """
    fewest = cost.fewest_uses
    when = "if each view is used more than once"
    if fewest == math.inf:
        when = "never at this read speed"
    elif fewest >= 1.05:
        when = f"if each view is used more than {fewest:.2g} times"
    return [
        ("maps", f"{cost.images:,} images x {cost.views} views, {size(cost.map_bytes)} each"),
        (
            "time to write",
            f"about {clock(math.ceil(cost.writing_seconds))} on one {options.gpu}, for the "
            "teacher alone; the progress bar estimates the time on this machine once writing "
            "begins",
        ),
        ("disk", f"{size(cost.total_bytes)} ({options.precision})"),
        ("uses of a view", f"{cost.uses:.3g}, over all epochs and runs"),
        (
            "time per image",
            f"teacher {_ms(cost.teacher_seconds)}, the rest of a step {_ms(cost.student_seconds)}, "
            f"reading a map {_ms(cost.read_seconds)} (one {options.gpu}, micro-batches of "
            f"{micro_batch}, reading {options.read_gb:g} GB/s)",
        ),
        ("reading keeps up", f"at {cost.least_rate / 1e9:.2g} GB/s or more for each rank"),
        ("saves time", when),
        ("verdict", _verdict(cost)),
    ]


def _verdict(cost: CachedTargets) -> str:
    """Returns a sentence on whether storing a teacher's maps saves time in runs that read them."""
    share = f"{100 * abs(cost.saved_share):.0f} %"
    if cost.pays:
        return f"cached targets pay: {share} less time"
    if cost.fewest_uses == math.inf:
        return f"CACHED TARGETS DO NOT PAY: {share} more time"
    if cost.uses > cost.fewest_uses:
        return f"cached targets hardly pay: at most {100 * SECONDS_TOLERANCE:.0f} % less time"
    return f"CACHED TARGETS DO NOT PAY: each view is used too seldom ({cost.uses:.3g})"


def _ms(seconds: float) -> str:
    return f"{1e3 * seconds:.3g} ms"
