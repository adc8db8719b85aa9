"""Computes the costs of storing the teachers' maps from shapes alone, for `cache --plan`."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from fd_large.plan.cached_targets import CachedTargets
from fd_large.plan.candidate import Candidate
from fd_large.plan.cluster import Cluster, Machine
from fd_large.plan.rates import Rates
from fd_large.plan.step_time import estimate
from fd_large.plan.workload import Workload

if TYPE_CHECKING:
    from fd_large.tasks.distillation.job import DistillationJob


def micro_batch_of(job: DistillationJob, load: Workload) -> int:
    """Returns the number of images in a rank's forward pass, for which `plan` computes times.

    This is the number for which alone the counts of `load` hold, if there is one. Otherwise it is
    the run's micro-batch size, with a default for `auto`, and at most the global batch size.
    """
    from fd_large.tasks.distillation.cached.views import batch_size

    batch = job.run.batch
    usual = batch_size(batch.micro_batch_size)
    return load.counts[False].images or min(usual, batch.global_batch_size)


def costs_of(
    job: DistillationJob,
    *,
    load: Workload,
    rates: Rates,
    images: int,
    precision: str,
    runs: int,
    read_bytes_per_second: float,
) -> dict[str, CachedTargets]:
    """Returns the costs and savings of storing each teacher's maps, by the teacher's name.

    Times are estimated as in `plan`, for one rank without communication. The time of all teachers
    is divided among them in proportion to their FLOPs.

    Args:
        job: The job of a recipe with fixed views, in which the models of all teachers are known.
        load: FLOPs and bytes of the workload on the card.
        images: Number of images of the dataset.
        precision: Number format of the stored maps.
        runs: Number of equal runs that use the maps.
        read_bytes_per_second: Rate at which a rank reads the maps.
    """
    # Importing torch takes seconds.
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from fd_large.engine.counting.step import on_shapes
    from fd_large.kernels.choose import Device
    from fd_large.tasks.distillation.cached.write import header_for

    run, fixed = job.run, job.caches.fixed
    assert fixed is not None
    side = run.data.image_size
    flops, bytes_ = {}, {}
    with on_shapes(Device(None)), torch.no_grad():
        for name, teacher in job.make_teachers().items():
            with FlopCounterMode(display=False) as counter:
                maps = teacher(torch.zeros(1, 3, side, side, dtype=torch.uint8))
            flops[name] = counter.get_total_flops()
            bytes_[name] = header_for(maps, precision).record_bytes
    step, rest = _seconds_of_an_image(job, load, rates)
    seconds = {name: (step - rest) * n / max(1, sum(flops.values())) for name, n in flops.items()}
    optim, batch = run.optim, run.batch.global_batch_size
    epochs = optim.max_steps * batch / images if optim.max_steps else optim.epochs
    return {
        name: CachedTargets(
            images=images,
            views=fixed.count,
            uses=max(1.0, epochs * runs / fixed.count),
            map_bytes=bytes_[name],
            teacher_seconds=teacher_seconds,
            # The time of the other teachers counts here, whether their maps are stored or not.
            student_seconds=step - teacher_seconds,
            read_bytes_per_second=read_bytes_per_second,
        )
        for name, teacher_seconds in seconds.items()
    }


def _seconds_of_an_image(job: DistillationJob, load: Workload, rates: Rates) -> tuple[float, float]:
    """Returns a step's seconds per image on one rank: with the teachers run, and without them."""
    candidate = Candidate(
        stage=1,
        checkpointing=job.run.student.activation_checkpointing != "off",
        micro_batch_size=micro_batch_of(job, load),
    )
    alone = Machine(
        cluster=Cluster(gpus=1, gpus_per_node=1, nic_gigabits=1, nics_per_node=1), rates=rates
    )
    counts = {wrapped: each.without("inference") for wrapped, each in load.counts.items()}
    step, rest = (
        estimate(work, candidate, alone).seconds for work in (load, replace(load, counts=counts))
    )
    taken = candidate.micro_batch_size * step.accumulation
    return step.total / taken, rest.total / taken
