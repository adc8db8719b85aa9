"""What a step of the real task computes, moves, keeps and starts, counted on the meta device.

The task of a job is built on the meta device, where tensors have shapes but no values, and runs
forward and backward there, under a `Recorder` (`engine/recorder.py`).

Counts at two micro-batches give all others, because everything is a straight line in the images
(`plan/counts.py`). Where it is not, as in attention by a few windows at a time, one micro-batch
alone is counted.
"""

from __future__ import annotations

import functools
import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves

from fd_large.data.loader import Batch
from fd_large.engine.block_wrappers import checkpoint_blocks
from fd_large.engine.forward_backward import completed
from fd_large.engine.job import Job
from fd_large.engine.recorder import NotLinear, Recorder, aten, bytes_of
from fd_large.engine.task import Task
from fd_large.engine.zero.partition import to_bfloat16
from fd_large.errors import ConfigError, FDError
from fd_large.kernels import choose
from fd_large.kernels.check import IMAGES, Call, recording
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
from fd_large.ranks import activity
from fd_large.recipes.sections import AUTO

log = logging.getLogger(__name__)


# The micro-batches that are counted, times `Job.images_together`. Not 1, where copies turn into
# views.
SIZES = (2, 4)


def _attention(
    on_gpu: bool,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    **_: Any,
) -> Tensor:
    """Calls the kernel that a device has for torch's attention; meta would take it apart."""
    if q.ndim == 3:  # The heads are in the batch, as in SAM.
        q, k, v = (part[:, None] for part in (q, k, v))
        mask = None if attn_mask is None else attn_mask[:, None]
        return _attention(on_gpu, q, k, v, mask, dropout_p, is_causal, scale)[:, 0]
    if not on_gpu:
        return aten._scaled_dot_product_flash_attention_for_cpu(
            q, k, v, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
        )[0]
    if attn_mask is None:
        return aten._scaled_dot_product_flash_attention(
            q, k, v, dropout_p, is_causal, False, scale=scale
        )[0]
    mask = attn_mask.to(q.dtype).expand(*q.shape[:-1], k.shape[-2])
    log_sum = torch.is_grad_enabled() and any(t.requires_grad for t in (q, k, v, mask))
    return aten._scaled_dot_product_efficient_attention(
        q, k, v, mask, log_sum, dropout_p, is_causal, scale=scale
    )[0]


@contextmanager
def _watched(
    recorder: Recorder, task: Task, frozen: Iterable[nn.Module], images: Tensor
) -> Iterator[Counter]:
    """Tells the recorder which modules run; yields their forwards by phase. Drops gradients."""
    modules: Counter[str] = Counter()
    sums = task.sums
    handles = []

    def enter(*_: Any) -> None:
        recorder.inside += 1
        modules[recorder.phase] += 1

    def leave(*_: Any) -> None:
        recorder.inside -= 1

    def infer(*_: Any) -> None:
        recorder.phase = "inference"

    def learn(*_: Any) -> None:
        recorder.phase = "forward"

    def first_pass(*arguments: Any) -> Tensor:
        # The images of a batch are released once the batch is prepared.
        recorder.held = recorder.live - bytes_of(images)
        recorder.phase = "first_pass"
        try:
            return sums(*arguments)
        finally:
            recorder.phase = "forward"

    task.sums = first_pass  # type: ignore[method-assign]
    for model in frozen:
        handles.append(model.register_forward_pre_hook(infer))
        handles.append(model.register_forward_hook(learn))
    for model in (task, *frozen):
        for module in model.modules():
            handles.append(module.register_forward_pre_hook(enter))
            # Recomputation ends by an exception once it has what it needs.
            handles.append(module.register_forward_hook(leave, always_call=True))
    for p in task.parameters():
        if p.requires_grad:
            handles.append(p.register_post_accumulate_grad_hook(_drop))
    try:
        yield modules
    finally:
        del task.sums
        for handle in handles:
            handle.remove()


def _drop(p: Tensor) -> None:
    p.grad = None


class _One(NamedTuple):
    """Counts of one micro-batch."""

    recorder: Recorder
    modules: Counter[str]
    kept: int


def run_on_shapes(
    task: Task, frozen: Iterable[nn.Module], batch: Batch, recorder: Recorder
) -> _One:
    """Runs forward and backward of a task under a recorder.

    Args:
        task: On the meta device.
        frozen: Models that it uses and does not train.
        batch: On the meta device.
        recorder: Writes down what runs.
    """
    frozen = tuple(frozen)
    for t in tree_leaves((batch.images, batch.targets)):
        if isinstance(t, Tensor):
            recorder.follow(t)
    with _watched(recorder, task, frozen, batch.images) as modules, recorder:
        loss = task.shapes_only(batch)
        kept = recorder.live
        recorder.phase = "backward"
        loss.backward()
    return _One(recorder, modules, kept)


def count(
    job: Job,
    device: choose.Device,
    *,
    bfloat16: bool,
    frozen_bfloat16: bool,
    checkpointing: Iterable[bool] = (False, True),
    micro_batch_size: int | str = AUTO,
    image_size: int = 0,
) -> dict[bool, Counts]:
    """Counts a micro-batch of a job's task as a device would run it.

    Args:
        job: Its weights and its images are not touched.
        device: Decides the kernels.
        bfloat16: Whether the task computes in bfloat16.
        frozen_bfloat16: Whether frozen models do.
        checkpointing: False for no checkpoints, True for those of each `checkpoint_every`-th block
            of the student; False comes first.
        micro_batch_size: Counted alone if the task is not linear in its images; auto: as many
            images as belong together.
        image_size: Side of the images; 0: that of the job's probe batch, the largest.

    Returns: the counts with and without checkpoints, as asked.
    Raises: FDError: if the models cannot be built, or cannot run without values.
    """
    result: dict[bool, Counts] = {}
    with activity.work("counting the operations of a step"), on_shapes(device):
        task, frozen = _models(job, bfloat16=bfloat16, frozen_bfloat16=frozen_bfloat16)

        def at(size: int, like: _One | None = None) -> _One:
            recorder = Recorder((task, *frozen), like=like.recorder.names if like else None)
            one = run_on_shapes(task, frozen, _probe(job, size, image_size), recorder)
            if like and len(recorder.names) != len(like.recorder.names):
                raise NotLinear
            return one

        with torch.no_grad():  # Fills caches, whose tables would be counted with the first.
            task.shapes_only(_probe(job, SIZES[0], image_size))
        images, together = 0, job.images_together()
        small, large = (size * together for size in SIZES)
        for wrapped in checkpointing:
            if wrapped:
                every = job.run.student.checkpoint_every
                checkpoint_blocks(task.student.blocks(), mode="every", every=every)
            if not images:
                try:
                    first = at(small)
                    second = at(large, like=first)
                except NotLinear:
                    images = together if micro_batch_size == AUTO else int(micro_batch_size)
            if images:
                first = second = at(images)
            sizes = (0, images) if images else (small, large)
            result[wrapped] = _counts(first, second, sizes, images, task, frozen)
    return result


def shared_bytes(job: Job, device: choose.Device, *, frozen_bfloat16: bool) -> Line:
    """Returns the bytes of a micro-batch's images and of what the frozen models say of them.

    Args:
        job: Its weights and its images are not touched.
        device: Decides the kernels.
        frozen_bfloat16: Whether frozen models compute in bfloat16.

    Raises: FDError: if the models cannot be built, or cannot run without values.
    """
    with on_shapes(device):
        task, _ = _models(job, bfloat16=False, frozen_bfloat16=frozen_bfloat16)
        small, large = (size * job.images_together() for size in SIZES)
        first, second = (
            sum(bytes_of(tensor) for tensor in completed(task, job.probe_batch(size)).tensors())
            for size in (small, large)
        )
    return through(first, second, (small, large))


def _probe(job: Job, images: int, image_size: int) -> Batch:
    """A probe batch, of images of another side unless that is 0."""
    batch = job.probe_batch(images)
    if image_size:
        shape = (*batch.images.shape[:2], image_size, image_size)
        batch = replace(batch, images=batch.images.new_empty(shape))
    return batch


def step_flops(
    job: Job,
    micro_batch_size: int,
    *,
    checkpointing: bool,
    micro_batches: int = 1,
    image_size: int = 0,
) -> StepFlops | None:
    """Returns the FLOPs of a micro-batch as this device runs it; None if it cannot be counted.

    Args:
        job: Its weights and its images are not touched.
        micro_batch_size: Images.
        checkpointing: Whether the student's blocks are checkpointed.
        micro_batches: Number of a rank's micro-batches in a step.
        image_size: See `count`.
    """
    # What a CPU computes is that of fused kernels, which are counted in the shortest time.
    device = choose.Device((9, 0))
    if torch.cuda.is_available():
        capability = None if torch.version.hip else torch.cuda.get_device_capability()
        device = choose.Device(capability, wish=choose.wished())
    try:
        with on_shapes(device):
            task, frozen = _models(job, bfloat16=True, frozen_bfloat16=True)
            if checkpointing:
                every = job.run.student.checkpoint_every
                checkpoint_blocks(task.student.blocks(), mode="every", every=every)
            recorder = Recorder((task, *frozen))
            batch = _probe(job, micro_batch_size, image_size)
            one = run_on_shapes(task, frozen, batch, recorder)
            sizes = (0, micro_batch_size)
            counts = _counts(one, one, sizes, micro_batch_size, task, frozen)
            return counts.in_step_of(micro_batches).step_flops(micro_batch_size)
    except FDError as error:
        log.debug("FLOPs and utilisation are not reported: %s", error)
        return None


def kernel_calls(
    job: Job, device: choose.Device, *, bfloat16: bool, frozen_bfloat16: bool
) -> list[Call]:
    """Returns the calls of fused operations in a step of two images; see `kernels/check.py`.

    Args:
        job: Its weights and its images are not touched.
        device: What will run them.
        bfloat16: Whether the task computes in bfloat16.
        frozen_bfloat16: Whether frozen models do.

    Raises: FDError: if a step cannot run without values.
    """
    with on_shapes(device), recording() as calls:
        task, _ = _models(job, bfloat16=bfloat16, frozen_bfloat16=frozen_bfloat16)
        task.shapes_only(job.probe_batch(IMAGES))
    return list(calls)


def _models(
    job: Job, *, bfloat16: bool, frozen_bfloat16: bool
) -> tuple[Task, tuple[nn.Module, ...]]:
    """The task and the frozen models that it uses, within `on_shapes`."""
    task, frozen = job.models_on_shapes()
    if bfloat16:
        to_bfloat16(task)
    for model in frozen if frozen_bfloat16 else ():
        to_bfloat16(model)
    return task, frozen


@contextmanager
def on_shapes(device: choose.Device) -> Iterator[None]:
    """Within it models are built and run on the meta device, as a device would run them.

    Raises: ConfigError: if a model cannot run there.
    """
    ours = functools.partial(_attention, device.on_gpu)
    torchs, nn.functional.scaled_dot_product_attention = (
        nn.functional.scaled_dot_product_attention,
        ours,
    )
    try:
        # Random weights of no values would move the generator on.
        with choose.standing_in(device), torch.random.fork_rng(devices=[]), torch.device("meta"):
            yield
    except FDError:
        raise
    except Exception as error:  # Code of the user's own may raise anything.
        raise ConfigError(
            f"count: a step does not run on shapes alone; got {type(error).__name__}: {error}, "
            "expected models and a loss that torch's meta device can run. Plan with others that "
            "are near in size."
        ) from error
    finally:
        nn.functional.scaled_dot_product_attention = torchs


def _counts(
    first: _One,
    second: _One,
    at: tuple[int, int],
    images: int,
    task: Task,
    frozen: Iterable[nn.Module],
) -> Counts:
    products: Counter[tuple] = Counter()
    moved: dict[str, Line] = {}
    again = NOTHING
    pairs = zip(first.recorder.operations, second.recorder.operations, strict=True)
    for one, two in pairs:
        bytes_ = through(one.read + one.written, two.read + two.written, at)
        if not one.flops:
            moved[one.phase] = moved.get(one.phase, NOTHING) + bytes_
            continue
        flops = through(one.flops, two.flops, at)
        products[one.phase, one.again, flops, bytes_] += 1
        # The backward of attention computes one product of five again.
        if "attention" in one.name and one.name.endswith("backward"):
            again += Line(flops.fixed / 5, flops.each / 5)
    trail = zip(first.recorder.trail, second.recorder.trail, strict=True)
    return Counts(
        products=tuple(
            Product(phase, again, times, flops, bytes_)
            for (phase, again, flops, bytes_), times in products.items()
        ),
        again=again,
        moved=moved,
        calls=dict(second.recorder.calls),
        modules=dict(second.modules),
        held=through(first.recorder.held, second.recorder.held, at),
        kept=through(first.kept, second.kept, at),
        peak=highest([through(a, b, at) for a, b in trail]),
        student=grouped(p.numel() for p in task.parameters() if p.requires_grad),
        frozen=tuple(grouped(p.numel() for p in model.parameters()) for model in frozen),
        images=images,
        fused=second.recorder.fused,
    )
