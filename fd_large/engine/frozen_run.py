"""A recipe of which only the frozen models are built: no student, no optimiser, no checkpoint."""

from __future__ import annotations

from typing import NamedTuple

from fd_large.data.blocks import keep_blocks_in
from fd_large.data.source import ImageSource
from fd_large.engine import memory, node_consistency
from fd_large.engine.checkpoint_models import sources_of
from fd_large.engine.job import Job, JobOf
from fd_large.engine.zero import config as ds
from fd_large.engine.zero import start
from fd_large.errors import check_all
from fd_large.kernels.precision import full_float32
from fd_large.plan.memory import persistence_threshold
from fd_large.ranks import activity, distributed, meeting


class FrozenRun(NamedTuple):
    """The job of a recipe, its frozen models built, and the training samples."""

    job: Job
    samples: ImageSource


def open_frozen(job: Job, job_of: JobOf) -> FrozenRun:
    """Checks a recipe and builds the models that it does not train; a collective.

    They are held and compute as in the run itself.

    Args:
        job: The job of the recipe.
        job_of: Makes it again once the recipe is settled.

    Raises: FDError: for the user's mistakes, before anything heavy.
    """
    launch = distributed.start()
    weights = sources_of(job_of)
    with activity.work("reading images and weights"):
        settled = meeting.meet(lambda: job.settle(weights))
    run = distributed.broadcast_object(settled)
    job = job_of(run)
    job.weights = weights
    keep_blocks_in(run.data.cache, run.data.cache_gb)

    def check() -> tuple[ImageSource, tuple[int, ...]]:
        samples, _ = check_all(job.open_samples, job.check)
        sizes = job.parameter_sizes()
        for where, source in job.sources().items():
            weights.resolve(source, where=f"--{where}").fetch()
        return samples, sizes

    with activity.work("checking the recipe"):
        samples, sizes = meeting.meet(check)
    node_consistency.check(samples, job.sources(), weights, run.code())
    with activity.work("copying images"):
        samples = job.stage(samples)
    start.start()
    full_float32(distributed.device())
    with activity.work("building the models"), memory.building_in_memory(job.memory_remedy):
        job.build(
            bfloat16=ds.computes_in_bfloat16(run.engine.precision),
            node_size=ds.ranks_of_a_node(run.engine.node_size, launch.local_world_size),
            persistence_threshold=persistence_threshold(sizes),
        )
    weights.forget()
    return FrozenRun(job, samples)
