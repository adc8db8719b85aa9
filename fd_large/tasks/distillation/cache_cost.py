"""What it takes to store the maps of a recipe's teachers, reckoned from shapes alone."""

from __future__ import annotations

import torch
from torch.utils.flop_counter import FlopCounterMode

from fd_large.engine.count import on_shapes, step_flops
from fd_large.errors import ConfigError
from fd_large.kernels.choose import Device
from fd_large.plan.cached_targets import CachedTargets
from fd_large.plan.counts import StepFlops
from fd_large.tasks.distillation.cached_teacher import header_for
from fd_large.tasks.distillation.job import DistillationJob


def costs_of(
    job: DistillationJob,
    *,
    step: StepFlops | None,
    images: int,
    precision: str,
    runs: int,
    flops_per_second: float,
    read_bytes_per_second: float,
) -> dict[str, CachedTargets]:
    """Returns what each teacher's maps cost and save, by the teacher's name.

    Args:
        job: The job of a settled recipe with fixed views.
        step: What a step of one image takes; None: it is counted here.
        images: Images of the dataset.
        precision: How the maps are stored.
        runs: Runs like this one that use them.
        flops_per_second: Rate of a rank in matrix products.
        read_bytes_per_second: Rate at which a rank reads the maps.

    Raises: ConfigError: if a step cannot be counted.
    """
    run, fixed = job.run, job.fixed_views
    assert fixed is not None
    step = step or step_flops(job, 1, checkpointing=False)
    if step is None:
        raise ConfigError(
            "cache: a step of this recipe cannot be counted on shapes alone; got models that do "
            "not run there, expected others. Leave --plan out."
        )
    side = run.data.image_size
    flops, bytes_ = {}, {}
    with on_shapes(Device(None)), torch.no_grad():
        for name, teacher in job.make_teachers().items():
            with FlopCounterMode(display=False) as counter:
                given = teacher(torch.zeros(1, 3, side, side, dtype=torch.uint8))
            flops[name] = counter.get_total_flops()
            bytes_[name] = header_for(given, precision).record_bytes
    optim, batch = run.optim, run.batch.global_batch_size
    epochs = optim.max_steps * batch / images if optim.max_steps else optim.epochs
    return {
        name: CachedTargets(
            images=images,
            views=fixed.count,
            uses=max(1.0, epochs * runs / fixed.count),
            map_bytes=bytes_[name],
            teacher_flops=flops[name],
            # The other teachers are a part of the rest, whether their maps are stored or not.
            student_flops=step.model - flops[name],
            flops_per_second=flops_per_second,
            read_bytes_per_second=read_bytes_per_second,
        )
        for name in flops
    }
