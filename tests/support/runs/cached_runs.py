"""Jobs that learn from a teacher and from its stored maps, on the same few images."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import tiny_runs
import torch
from PIL import Image

from fd_large.data.sampler import Portion
from fd_large.recipes.fields import override
from fd_large.tasks.distillation.cached.write import CacheWriter, header_of, write_cache
from fd_large.tasks.distillation.job import DistillationJob
from fd_large.weights.resolve import Sources

IMAGES, VIEWS = 12, 2


def write_images(folder) -> None:
    """Writes images of coarse noise."""
    folder.mkdir(exist_ok=True)
    random = np.random.default_rng(0)
    for number in range(IMAGES):
        coarse = random.integers(0, 256, (6, 7, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((42, 36)).save(folder / f"{number:02d}.png")


def run_of(root, **fields):
    """The tiny run on these images, whose views come again, with other values of some fields."""
    named = {
        "data.root": str(root),
        "data.workers": 0,
        "eval.root": "",
        "batch.global_batch_size": 4,
        "batch.micro_batch_size": 2,
        "objective.interpolation": "bilinear",
        "task.distillation.views": VIEWS,
        "task.distillation.view_seed": 5,
        **fields,
    }
    return override(tiny_runs.tiny_run(), named)


def built(run) -> DistillationJob:
    """The job of a run, as a start makes it: settled, checked, its teachers built."""
    job = DistillationJob(run)
    job = DistillationJob(job.settle(Sources()))
    job.samples = job.open_samples()
    job.check()
    job.build(bfloat16=False, node_size=1, persistence_threshold=0)
    return job


def write(job, folder, *, precision="fp32", most=None, max_bad_fraction=0.5, **more) -> int:
    """Writes the cache of a job; `most`: it is killed after so many records."""
    (teacher,), (entry,) = job.placed.values(), job.run.taught_by.values()
    facts = job.caches.facts(job.samples)
    header = replace(
        header_of(teacher, entry, facts, precision=precision), records_per_shard=IMAGES // 2
    )
    writer = CacheWriter(folder, header)
    if most is not None:
        writer.write = killed_after(writer.write, most)
    views = replace(job.caches.views_to_store(job.samples), batch_size=2)
    return write_cache(
        writer, teacher, views, workers=0, max_bad_fraction=max_bad_fraction, where="OUT", **more
    )


class Killed(BaseException):
    """What ends a writer between two records."""


def killed_after(write, most):
    def wrapped(*args):
        nonlocal most
        most -= 1
        if most < 0:
            raise Killed
        write(*args)

    return wrapped


def cached(root, cache, **fields) -> DistillationJob:
    """The job of the run that learns from a cache."""
    return built(run_of(root, **{"teacher.source": f"cached:{cache}", **fields}))


def prepared(job, epoch):
    """Yields an epoch's micro batches of two, each with what the task makes of it."""
    torch.manual_seed(0)
    task = job.make_task()
    for batch in job.batches(job.samples, Portion(epoch, 0, 2, 0, 1)):
        yield batch, task.prepare(batch.images, batch.targets, None)
