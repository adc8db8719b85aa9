"""What a step of the real task computes, moves, keeps and starts, counted on the meta device.

The task of a job is built on the meta device, where tensors have shapes but no values, and runs
forward and backward there. Each dispatched operation is written down: the FLOPs of its matrix
products (torch's own formulas; a fused operation brings its own), its bytes (each distinct input is
read once, each new output written once, views are free), and a call. Storages are followed from
birth to death, which gives what forward keeps for backward, and the peak.

Counts at two micro-batches give all others, because everything is a straight line in the images
(`plan/counts.py`). Where it is not, as in attention by a few windows at a time, one micro-batch
alone is counted.
"""

from __future__ import annotations

import functools
import logging
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from fd_large.data.loader import Batch
from fd_large.engine.block_wrappers import checkpoint_blocks
from fd_large.engine.job import Job
from fd_large.engine.task import Task
from fd_large.engine.zero.partition import to_bfloat16
from fd_large.errors import ConfigError, FDError
from fd_large.kernels import choose
from fd_large.plan.counts import (
    NOTHING,
    Counts,
    Line,
    Phase,
    Product,
    StepFlops,
    grouped,
    highest,
    through,
)

log = logging.getLogger(__name__)

aten = torch.ops.aten

FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_"),
    *("alias", "detach", "detach_", "_unsafe_view", "lift_fresh", "_reshape_alias", "sym_size"),
    *("_local_scalar_dense", "is_same_size"),
}
# They take a tensor for its dtype and device only.
FACTORIES = {"new_full", "new_zeros", "new_ones", "zeros_like", "ones_like", "full_like"}
WRITE_ONLY = {"zero_", "fill_", "copy_", "bernoulli_", "normal_", "uniform_", "random_"}
GATHER = {"index", "index_select", "embedding", "gather"}

# The micro-batches that are counted. Not 1, where copies turn into views.
SIZES = (2, 4)


def _convolution_backward(out: Tensor, x: Tensor, weight: Tensor, *rest: Any, **_: Any) -> int:
    # torch's own (2.13) leaves out that groups share the channels.
    return sum(rest[-1][:2]) * 2 * out.numel() * weight[0].numel()


FORMULAS: dict[Any, Callable[..., int]] = {
    **flop_registry,
    aten.convolution_backward: _convolution_backward,
    aten._scaled_dot_product_flash_attention_for_cpu: flop_registry[
        aten._scaled_dot_product_flash_attention
    ],
    aten._scaled_dot_product_flash_attention_for_cpu_backward: flop_registry[
        aten._scaled_dot_product_flash_attention_backward
    ],
}


class Operation(NamedTuple):
    """One dispatched operation.

    Attributes:
        phase: Where it runs.
        again: Whether it computes again what forward has computed.
        name: Its name.
        flops: Of matrix products.
        read: Bytes.
        written: Bytes.
    """

    phase: Phase
    again: bool
    name: str
    flops: int
    read: int
    written: int


class NotLinear(Exception):
    """A micro-batch calls other operations than another does."""


class _Known(NamedTuple):
    name: str
    free: bool
    mutated: tuple[bool, ...]
    fresh: tuple[bool, ...]
    flops: Callable[..., int] | None


class Recorder(TorchDispatchMode):
    """Writes down what is dispatched while it is on.

    Args:
        models: Their parameters and buffers are no part of what lives.
        like: Names of the calls that are expected; None: any.

    Attributes:
        phase: What runs now; the caller sets it.
        inside: How many modules are running now.
        operations: What computed or moved something.
        calls: All calls by phase, views included.
        live: Bytes of storages now.
        names: Names of all calls.
        trail: Live bytes at each call.
        fused: Whether a fused kernel was called.
    """

    def __init__(
        self, models: Iterable[nn.Module] = (), *, like: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self._like = like
        self.names: list[str] = []
        self.phase: Phase = "forward"
        self.inside = self.live = 0
        self.fused = False
        device = choose.stood_for()
        self._on_cpu = device is not None and not device.on_gpu
        self.operations: list[Operation] = []
        self.calls: Counter[str] = Counter()
        self.trail: list[int] = []
        self._known: dict[Any, _Known] = {}
        own = (t for model in models for t in (*model.parameters(), *model.buffers()))
        self._storages: dict[int, Any] = {t.untyped_storage()._cdata: None for t in own}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        known, beside = self._known.get(func) or self._learn(func), 0
        if known.name == "convolution" and args[0].is_contiguous(memory_format=torch.channels_last):
            # As on a card: the meta device, which knows no backend, leaves channels first.
            out = torch.empty_like(out, memory_format=torch.channels_last)
        elif known.name == "smooth_l1_loss" and not out.shape:
            # As on devices, where the mean lies in the storage of what it is the mean of.
            out = args[0].new_empty(args[0].shape).view(-1)[0]
            beside = bytes_of(args[0])  # What is averaged lives beside it.
        self.calls[self.phase] += 1
        self.names.append(known.name)
        if self._like is not None and not self._expected(known.name):
            raise NotLinear
        outs = [out] if isinstance(out, Tensor) else tensors_of(out)
        for t in outs:
            self.follow(t)
        beside += _copies(known.name, args, outs) if self._on_cpu else 0
        self.trail.append(self.live + beside)
        if not known.free:
            self.record(func, known, args, kwargs, outs, out)
        return out

    def _expected(self, name: str) -> bool:
        place, names = len(self.trail), self._like or ()
        return place < len(names) and names[place] == name

    def record(
        self, func: Any, known: _Known, args: Any, kwargs: Any, outs: list[Tensor], out: Any
    ) -> None:
        """Writes an operation down."""
        flops = known.flops(*args, **kwargs, out_val=out) if known.flops else 0
        # Backward runs modules only where it computes their forward again.
        again = self.phase == "backward" and (self.inside > 0 or torch.is_grad_enabled())
        moved = _moved(known, args, kwargs, outs)
        self.operations.append(Operation(self.phase, again, known.name, flops, *moved))

    def _learn(self, func: Any) -> _Known:
        (space, name), returns = func._schema.name.split("::"), func._schema.returns
        self.fused |= space == "fd_large"
        views = returns and all(r.alias_info and not r.alias_info.is_write for r in returns)
        known = self._known[func] = _Known(
            name,
            bool(views) or name in FREE,
            tuple(bool(a.alias_info and a.alias_info.is_write) for a in func._schema.arguments),
            tuple(r.alias_info is None for r in returns),
            FORMULAS.get(func._overloadpacket),
        )
        return known

    def follow(self, t: Tensor) -> None:
        """Counts a tensor's storage as alive until it is gone."""
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self._storages:
            return
        size = storage.nbytes()
        self.live += size

        def gone(_: Any) -> None:
            self.live -= size
            del self._storages[key]

        self._storages[key] = weakref.ref(storage, gone)


def _copies(name: str, args: Any, outs: list[Tensor]) -> int:
    """Bytes of the copies in a layout of its own that a CPU's convolution makes while it runs.

    oneDNN's, for all but channels that come last: of the larger of input and output in forward; in
    backward of both, and of a gradient that is not contiguous.
    """
    if name not in ("convolution", "convolution_backward"):
        return 0
    backward = name.endswith("backward")
    x, out = (args[1], args[0]) if backward else (args[0], outs[0])
    if x.is_contiguous(memory_format=torch.channels_last):
        return 0
    sizes = bytes_of(x), bytes_of(out)
    if not backward:
        return max(sizes)
    return sum(sizes) + (0 if out.is_contiguous() else bytes_of(out))


def tensors_of(thing: Any) -> list[Tensor]:
    """Returns the tensors of an operation's argument or result that may be a list of them."""
    return [t for t in thing if isinstance(t, Tensor)] if isinstance(thing, (tuple, list)) else []


def _moved(known: _Known, args: Any, kwargs: Any, outs: list[Tensor]) -> tuple[int, int]:
    """Bytes that an operation reads and writes."""
    seen: dict[Any, int] = {}
    written = 0
    for i, argument in enumerate((*args, *kwargs.values())):
        mutated = i < len(args) and known.mutated[i]
        for t in (argument,) if isinstance(argument, Tensor) else tensors_of(argument):
            size = bytes_of(t)
            if mutated:
                written += size
                if known.name in WRITE_ONLY:
                    continue
            seen[place_of(t)] = size
    whole = len(known.fresh) != len(outs)
    written += sum(bytes_of(t) for i, t in enumerate(outs) if whole or known.fresh[i])
    if known.name in FACTORIES:
        return 0, written
    if known.name in GATHER:
        seen[place_of(args[0])] = min(bytes_of(args[0]), sum(bytes_of(t) for t in outs))
    return sum(seen.values()), written


def bytes_of(t: Tensor) -> int:
    """Returns the bytes of a tensor; a dimension of stride 0 counts as one element."""
    size = t.element_size()
    for n, step in zip(t.shape, t.stride(), strict=True):
        if step:
            size *= n
    return size


def place_of(t: Tensor) -> tuple[Any, ...]:
    """Returns what two tensors share that are the same bytes."""
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()


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
def _watched(recorder: Recorder, task: nn.Module, frozen: Iterable[nn.Module]) -> Iterator[Counter]:
    """Tells the recorder which modules run; yields their forwards by phase. Drops gradients."""
    modules: Counter[str] = Counter()
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
    with _watched(recorder, task, frozen) as modules, recorder:
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
    micro_batch_size: int = 1,
) -> dict[bool, Counts]:
    """Counts a micro-batch of a job's task as a device would run it.

    Args:
        job: Its weights and its images are not touched.
        device: Decides the kernels.
        bfloat16: Whether the task computes in bfloat16.
        frozen_bfloat16: Whether frozen models do.
        checkpointing: False for no checkpoints, True for those of each `checkpoint_every`-th block
            of the student; False comes first.
        micro_batch_size: Counted alone if the task is not linear in its images.

    Returns: the counts with and without checkpoints, as asked.
    Raises: FDError: if the models cannot be built, or cannot run without values.
    """
    result: dict[bool, Counts] = {}
    with on_shapes(device):
        task, frozen = job.models_on_shapes()
        if bfloat16:
            to_bfloat16(task)
        for model in frozen:
            if frozen_bfloat16:
                to_bfloat16(model)

        def at(size: int, like: _One | None = None) -> _One:
            recorder = Recorder((task, *frozen), like=like.recorder.names if like else None)
            one = run_on_shapes(task, frozen, job.probe_batch(size), recorder)
            if like and len(recorder.names) != len(like.recorder.names):
                raise NotLinear
            return one

        with torch.no_grad():  # Fills caches, whose tables would be counted with the first.
            task.shapes_only(job.probe_batch(SIZES[0]))
        images = 0
        for wrapped in checkpointing:
            if wrapped:
                every = job.run.student.checkpoint_every
                checkpoint_blocks(task.student.blocks(), mode="every", every=every)
            if not images:
                try:
                    first = at(SIZES[0])
                    second = at(SIZES[1], like=first)
                except NotLinear:
                    images = micro_batch_size
            if images:
                first = second = at(images)
            result[wrapped] = _counts(first, second, images, task, frozen)
    return result


def step_flops(job: Job, micro_batch_size: int, *, checkpointing: bool) -> StepFlops | None:
    """Returns the FLOPs of a micro-batch as this device runs it; None if it cannot be counted.

    Args:
        job: Its weights and its images are not touched.
        micro_batch_size: Images.
        checkpointing: Whether the student's blocks are checkpointed.
    """
    # What a CPU computes is that of fused kernels, which are counted in the shortest time.
    device = choose.Device((9, 0))
    if torch.cuda.is_available():
        capability = None if torch.version.hip else torch.cuda.get_device_capability()
        device = choose.Device(capability, wish=choose.wished())
    try:
        with on_shapes(device):
            task, frozen = job.models_on_shapes()
            for model in (task, *frozen):
                to_bfloat16(model)
            if checkpointing:
                every = job.run.student.checkpoint_every
                checkpoint_blocks(task.student.blocks(), mode="every", every=every)
            recorder, batch = Recorder((task, *frozen)), job.probe_batch(micro_batch_size)
            one = run_on_shapes(task, frozen, batch, recorder)
            return _counts(one, one, micro_batch_size, task, frozen).step_flops(micro_batch_size)
    except FDError as error:
        log.info("FLOPs and utilisation are not reported: %s", error)
        return None


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
    first: _One, second: _One, images: int, task: Task, frozen: Iterable[nn.Module]
) -> Counts:
    at = (0, images) if images else SIZES
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
        if "attention" in one.name and one.name.endswith("backward"):  # One product of five.
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
        kept=through(first.kept, second.kept, at),
        peak=highest([through(a, b, at) for a, b in trail]),
        student=grouped(p.numel() for p in task.parameters() if p.requires_grad),
        frozen=grouped(p.numel() for model in frozen for p in model.parameters()),
        images=images,
        fused=second.recorder.fused,
    )
