"""Counts a real step on the meta device: FLOPs, bytes moved, bytes kept, and kernel calls.

The task of a job is built on the meta device, where tensors have shapes but no values, and runs a
step there (`step.py`) under a `Recorder`.

Each count is linear in the number of images, so that counts at two micro-batch sizes give the
counts at every size (`plan/counts.py`). If a count is not linear, as with attention in chunks of
windows, only a single size is counted.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fd_large.data.loader import Batch
from fd_large.engine.counting.recorder import NotLinear, Recorder, bytes_of
from fd_large.engine.counting.step import Models, models_of, on_shapes, run_step
from fd_large.engine.forward_backward import completed
from fd_large.engine.job import TrainingJob
from fd_large.errors import FDError
from fd_large.kernels import choose
from fd_large.kernels.check import IMAGES, Call, check, recording
from fd_large.plan.buckets import gathered_whole, prefetch_bucket
from fd_large.plan.counts import (
    NOTHING,
    Counts,
    Line,
    Product,
    StepFlops,
    grouped,
    highest,
    through,
)
from fd_large.plan.workload import frozen_in_bfloat16
from fd_large.ranks import activity, distributed
from fd_large.recipes.sections import AUTO

log = logging.getLogger(__name__)

# The micro-batches that are counted, times `images_together`. Not 1, where copies turn into
# views.
SIZES = (2, 4)


def record(models: Models, batch: Batch, *, like: Recorder | None = None) -> Recorder:
    """Runs a step on the meta device, and returns the recorder of its operations.

    `like` is the recorder of another micro-batch, whose operations the step must repeat, or None.

    Raises: NotLinear: if the step calls other operations than `like` has recorded.
    """
    recorder = Recorder(models.all(), like=like.names if like else None)
    for t in tree_leaves((batch.images, batch.targets)):
        if isinstance(t, Tensor):
            recorder.follow(t)
    models.task.before_step(0.0)  # Drops what an earlier micro-batch noted.
    with _modules_noted(recorder, models), recorder:
        run_step(models, batch, recorder.to)
    if recorder.held:  # The images of a batch are released once the batch is prepared.
        recorder.held -= bytes_of(batch.images)
    if like and len(recorder.names) != len(like.names):
        raise NotLinear
    return recorder


@contextmanager
def _modules_noted(recorder: Recorder, models: Models) -> Iterator[None]:
    """Makes a recorder count the forward calls of modules within the context.

    The counts are `recorder.inside`, `recorder.blocks` and `recorder.modules`. A parameter's
    gradient is freed as soon as backward has made it.
    """
    handles = []
    blocks, within = _gathered_whole(models)

    def enter(module: nn.Module, _: Any) -> None:
        recorder.inside += 1
        if module in blocks:
            recorder.blocks[recorder.phase] += 1
        elif module not in within:
            recorder.modules[recorder.phase] += 1

    def leave(*_: Any) -> None:
        recorder.inside -= 1

    def drop(p: Tensor) -> None:
        p.grad = None

    for module in (module for model in models.all() for module in model.modules()):
        handles.append(module.register_forward_pre_hook(enter))
        # Recomputation ends by an exception once it has the tensors that backward needs.
        handles.append(module.register_forward_hook(leave, always_call=True))
    for p in models.task.parameters():
        if p.requires_grad:
            handles.append(p.register_post_accumulate_grad_hook(drop))
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _gathered_whole(models: Models) -> tuple[set[nn.Module], set[nn.Module]]:
    """Returns the blocks of all models that ZeRO-3 gathers whole, and the modules inside them."""
    blocks: set[nn.Module] = set()
    within: set[nn.Module] = set()
    for model in models.all():
        trained = [p.numel() for p in model.parameters() if p.requires_grad or model != models.task]
        for part in model.modules():
            for block, modules in gathered_whole(part, prefetch_bucket(sum(trained))).items():
                blocks.add(block)
                within.update(modules[1:])
    return blocks, within


def count(
    job: TrainingJob,
    device: choose.Device,
    *,
    bfloat16: bool,
    frozen_bfloat16: bool,
    checkpointing: Iterable[bool] = (False, True),
    micro_batch_size: int | str = AUTO,
    image_size: int = 0,
) -> dict[bool, Counts]:
    """Counts what a step with one micro-batch of a job's task costs on a device.

    Args:
        job: The job that describes the task; no weights or images are read.
        device: The device for which kernels are chosen.
        bfloat16: Whether the task computes in bfloat16.
        frozen_bfloat16: Whether the frozen models compute in bfloat16.
        checkpointing: The cases to count: False without activation checkpointing, True with
            checkpointing of each `checkpoint_every`-th block of the student. False must come before
            True, which changes the models in place.
        micro_batch_size: The only size that is counted if the counts are not linear in the number
            of images; "auto" stands for `images_together` of the job.
        image_size: Side of the images in pixels; 0 for the side of the job's probe batch, which is
            the largest side in training.

    Returns: the counts of each case in `checkpointing`.
    Raises: FDError: if the models cannot be built, or cannot run without values.
    """
    result: dict[bool, Counts] = {}
    with activity.work("counting the operations of a step"), on_shapes(device):
        models = models_of(job, bfloat16=bfloat16, frozen_bfloat16=frozen_bfloat16)
        with torch.no_grad():  # Fills caches, whose tables would be counted with the first.
            models.task.shapes_only(_probe(job, SIZES[0], image_size))
        together = job.images_together()
        small, large = (size * together for size in SIZES)
        for wrapped in checkpointing:
            if wrapped:
                models.checkpoint(job.run.student.checkpoint_every)
            if small:
                try:
                    first = record(models, _probe(job, small, image_size))
                    second = record(models, _probe(job, large, image_size), like=first)
                except NotLinear:
                    small, large = 0, together
                    if micro_batch_size != AUTO:
                        large = int(micro_batch_size)
            if not small:
                first = second = record(models, _probe(job, large, image_size))
            result[wrapped] = _counts(first, second, (small, large), models)
    return result


def shared_bytes(job: TrainingJob, device: choose.Device, *, frozen_bfloat16: bool) -> Line:
    """Returns the bytes of a micro-batch: images, targets and the outputs of frozen models.

    They are linear in the number of images. For the arguments see `count`.

    Raises: FDError: if the models cannot be built, or cannot run without values.
    """
    with on_shapes(device):
        task, _ = models_of(job, bfloat16=False, frozen_bfloat16=frozen_bfloat16)
        small, large = (size * job.images_together() for size in SIZES)
        first, second = (
            sum(bytes_of(tensor) for tensor in completed(task, job.probe_batch(size)).tensors())
            for size in (small, large)
        )
    return through(first, second, (small, large))


def _probe(job: TrainingJob, images: int, image_size: int) -> Batch:
    """Returns the job's probe batch, with images of side `image_size` in pixels if it is not 0."""
    batch = job.probe_batch(images)
    if image_size:
        shape = (*batch.images.shape[:2], image_size, image_size)
        batch = replace(batch, images=batch.images.new_empty(shape))
    return batch


def step_flops(
    job: TrainingJob,
    micro_batch_size: int,
    *,
    checkpointing: bool,
    micro_batches: int = 1,
    image_size: int = 0,
) -> StepFlops | None:
    """Returns the FLOPs of a micro-batch as this process's device runs it.

    The result is None if the FLOPs cannot be counted, as for a task that cannot run without values.

    Args:
        job, image_size: See `count`.
        micro_batch_size: Number of images.
        checkpointing: Whether blocks of the student use activation checkpointing.
        micro_batches: Number of a rank's micro-batches in a step, which decides whether the step
            takes two passes.
    """
    # A CPU computes the same FLOPs as a GPU's fused kernels, whose counting takes the least time.
    device = choose.Device((9, 0))
    if torch.cuda.is_available():
        capability = None if torch.version.hip else torch.cuda.get_device_capability()
        device = choose.Device(capability, wish=choose.wished())
    try:
        with on_shapes(device):
            models = models_of(job, bfloat16=True, frozen_bfloat16=True)
            if checkpointing:
                models.checkpoint(job.run.student.checkpoint_every)
            recorder = record(models, _probe(job, micro_batch_size, image_size))
            counts = _counts(recorder, recorder, (0, micro_batch_size), models)
            return counts.in_step_of(micro_batches).step_flops(micro_batch_size)
    except FDError as error:
        log.debug("FLOPs and utilisation are not reported: %s", error)
        return None


def kernel_calls(
    job: TrainingJob, device: choose.Device, *, bfloat16: bool, frozen_bfloat16: bool
) -> list[Call]:
    """Returns the distinct calls of fused operations in a step of two images.

    Each call is one that `kernels/check.py` can compare with its reference. For the arguments see
    `count`.

    Raises: FDError: if a step cannot run on the meta device, where tensors have no values.
    """
    with on_shapes(device), recording() as calls:
        task, _ = models_of(job, bfloat16=bfloat16, frozen_bfloat16=frozen_bfloat16)
        task.shapes_only(job.probe_batch(IMAGES))
    return list(calls)


def check_kernels(job: TrainingJob, *, bfloat16: bool) -> None:
    """Compares the kernels that will run with their references, and turns off those that differ.

    All ranks must call this function. Rank 0 finds the calls to compare. `bfloat16` tells whether
    the task computes in bfloat16.
    """
    device = distributed.device()
    if not choose.may_run_kernels(device.type):
        return
    calls: list[Call] = []
    if distributed.is_main():
        teacher = job.run.frozen_dtype
        # In the interpreter on a CPU, the kernels are those of the newest card.
        capability = choose.CAPABILITIES[-1]
        if device.type == "cuda":
            capability = torch.cuda.get_device_capability()
        try:
            calls = kernel_calls(
                job,
                choose.Device(capability, on_gpu=device.type == "cuda", wish=choose.wished()),
                bfloat16=bfloat16,
                frozen_bfloat16=frozen_in_bfloat16(teacher, bfloat16),
            )
        except FDError as error:
            log.warning("kernels are not compared with their references: %s", error)
    check(distributed.broadcast_object(calls), device)


def _counts(first: Recorder, second: Recorder, at: tuple[int, int], models: Models) -> Counts:
    """Returns the counts of a step from the recorders of a smaller and of a larger micro-batch.

    `at` has the two sizes. If the first is 0, both recorders are the same, and the counts hold for
    the second size only.
    """
    products: Counter[tuple] = Counter()
    moved: dict[str, Line] = {}
    again = NOTHING
    for small, large in zip(first.operations, second.operations, strict=True):
        bytes_ = through(small.read + small.written, large.read + large.written, at)
        if not small.flops:
            moved[small.phase] = moved.get(small.phase, NOTHING) + bytes_
            continue
        flops = through(small.flops, large.flops, at)
        products[small.phase, small.again, flops, bytes_] += 1
        # The backward of attention computes one product of five again.
        if "attention" in small.name and small.name.endswith("backward"):
            again += Line(flops.fixed / 5, flops.each / 5)
    trail = zip(first.trail, second.trail, strict=True)
    return Counts(
        products=tuple(
            Product(phase, again, times, flops, bytes_)
            for (phase, again, flops, bytes_), times in products.items()
        ),
        again=again,
        moved=moved,
        calls=dict(second.calls),
        modules=dict(second.modules),
        blocks=dict(second.blocks),
        held=through(first.held, second.held, at),
        kept=through(first.kept, second.kept, at),
        peak=highest([through(a, b, at) for a, b in trail]),
        student=grouped(p.numel() for p in models.task.parameters() if p.requires_grad),
        frozen=tuple(
            grouped(p.numel() for p in model.parameters()) for model in models.frozen.values()
        ),
        images=0 if at[0] else at[1],
        fused=second.fused,
    )
