"""Records the operations of a computation: FLOPs, bytes, calls and live memory.

For each operation, the recorder counts the FLOPs of matrix products, the bytes, and a call. FLOPs
come from torch's formulas; a fused operation brings its own formula. Each distinct input is read
once and each new output written once; views are free. Storages are followed from allocation to
release, which gives the live memory at each moment.
"""

from __future__ import annotations

import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from fd_large.kernels import choose
from fd_large.plan.counts import Phase
from fd_large.plan.phases import BACKWARD, FIRST_PASS, FORWARD

aten = torch.ops.aten

PHASES: dict[str, Phase] = {
    FORWARD: "forward",
    FIRST_PASS: "first_pass",
    BACKWARD: "backward",
}
"""Names that counts use for a step's phases; other phases are forwards of frozen models."""

FREE = {
    *("empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "set_", "resize_"),
    *("alias", "detach", "detach_", "_unsafe_view", "lift_fresh", "_reshape_alias", "sym_size"),
    *("_local_scalar_dense", "is_same_size"),
}
# Operations that take a tensor for its dtype and device only.
FACTORIES = {"new_full", "new_zeros", "new_ones", "zeros_like", "ones_like", "full_like"}
WRITE_ONLY = {"zero_", "fill_", "copy_", "bernoulli_", "normal_", "uniform_", "random_"}
GATHER = {"index", "index_select", "embedding", "gather"}


def _convolution_backward(out: Tensor, x: Tensor, weight: Tensor, *rest: Any, **_: Any) -> int:
    # torch's own formula (2.13) ignores that groups share the channels. A transposed convolution is
    # the backward of another one, which applies its kernel at each position of its result.
    is_transposed = rest[4]
    places = (x if is_transposed else out).numel()
    return sum(rest[-1][:2]) * 2 * places * weight[0].numel()


# Beside torch's registry, to which fused operations add theirs when they are imported.
FORMULAS: dict[Any, Callable[..., int]] = {
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
        phase: Phase in which the operation runs.
        again: Whether the operation is in backward and repeats a computation of the forward pass.
        name: Name of the operator.
        flops: FLOPs of its matrix products.
        read: Bytes that it reads.
        written: Bytes that it writes.
    """

    phase: Phase
    again: bool
    name: str
    flops: int
    read: int
    written: int


class _Known(NamedTuple):
    name: str
    free: bool
    mutated: tuple[bool, ...]
    fresh: tuple[bool, ...]
    flops: Callable[..., int] | None


class Recorder(TorchDispatchMode):
    """Records each dispatched operation while active.

    Args:
        models: Models whose parameters and buffers do not count as live memory.
        like: Names of the expected calls, in order; None to accept any calls.

    Attributes:
        phase: Name of the running phase.
        inside: Number of modules that are running now. The code that runs the models sets this
            number, `blocks` and `modules`.
        blocks: Number of forward calls of blocks that ZeRO-3 gathers whole, by phase.
        modules: Number of forward calls of modules outside these blocks, by phase.
        operations: Operations that computed or moved data.
        calls: Number of all calls by phase, views included.
        live: Bytes of the storages that are alive now, without those of `models`.
        held: Live bytes when the first pass of a step in two passes began.
        kept: Live bytes when backward began.
        names: Names of all calls, in order.
        trail: Live bytes after each call, plus the temporary copies of the call.
        fused: Whether a fused operation of this package was called.
    """

    def __init__(
        self, models: Iterable[nn.Module] = (), *, like: Sequence[str] | None = None
    ) -> None:
        super().__init__()
        self._like = like
        self.names: list[str] = []
        self.phase: Phase = "forward"
        self.inside = self.live = self.held = self.kept = 0
        self.blocks: Counter[str] = Counter()
        self.modules: Counter[str] = Counter()
        self.fused = False
        device = choose.stood_for()
        self._on_cpu = device is not None and not device.on_gpu
        self.operations: list[Operation] = []
        self.calls: Counter[str] = Counter()
        self.trail: list[int] = []
        self._known: dict[Any, _Known] = {}
        model_tensors = (t for model in models for t in (*model.parameters(), *model.buffers()))
        self._storages: dict[int, Any] = {t.untyped_storage()._cdata: None for t in model_tensors}

    def to(self, phase: str) -> None:
        """Begins a phase, named as `run_step` names it."""
        self.phase = PHASES.get(phase, "inference")
        if phase == FIRST_PASS:
            self.held = self.live
        elif phase == BACKWARD:
            self.kept = self.live

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
        """Records an operation with its FLOPs and bytes.

        Args:
            func: The overload that was called.
            known: The name of `func`, its FLOP formula, and which tensors it changes or creates.
            args: Positional arguments of the call.
            kwargs: Keyword arguments of the call.
            outs: Tensors of the result.
            out: Result of the call.
        """
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
            FORMULAS.get(func._overloadpacket) or flop_registry.get(func._overloadpacket),
        )
        return known

    def follow(self, t: Tensor) -> None:
        """Counts the storage of tensor `t` as alive until the storage is released."""
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
    """Returns the bytes of the temporary copies that a convolution makes on a CPU.

    oneDNN copies tensors that are not channels-last: in forward the larger of input and output; in
    backward input, output and a gradient that is not contiguous. Other operators give 0.
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
    """Returns the tensors in `thing` if it is a list or tuple, else an empty list."""
    return [t for t in thing if isinstance(t, Tensor)] if isinstance(thing, (tuple, list)) else []


def _moved(known: _Known, args: Any, kwargs: Any, outs: list[Tensor]) -> tuple[int, int]:
    """Returns the bytes that an operation reads, and the bytes that it writes.

    `known` tells which arguments it changes, and `outs` are the tensors of its result.
    """
    read_bytes: dict[Any, int] = {}
    written = 0
    for i, argument in enumerate((*args, *kwargs.values())):
        mutated = i < len(args) and known.mutated[i]
        for t in (argument,) if isinstance(argument, Tensor) else tensors_of(argument):
            size = bytes_of(t)
            if mutated:
                written += size
                if known.name in WRITE_ONLY:
                    continue
            read_bytes[place_of(t)] = size
    whole = len(known.fresh) != len(outs)
    written += sum(bytes_of(t) for i, t in enumerate(outs) if whole or known.fresh[i])
    if known.name in FACTORIES:
        return 0, written
    if known.name in GATHER:
        read_bytes[place_of(args[0])] = min(bytes_of(args[0]), sum(bytes_of(t) for t in outs))
    return sum(read_bytes.values()), written


def bytes_of(t: Tensor) -> int:
    """Returns the bytes of tensor `t`; a dimension of stride 0 counts as one element."""
    size = t.element_size()
    for n, step in zip(t.shape, t.stride(), strict=True):
        if step:
            size *= n
    return size


def place_of(t: Tensor) -> tuple[Any, ...]:
    """Returns a key that is equal for tensors over the same bytes in the same shape and strides."""
    return t.untyped_storage()._cdata, t.storage_offset(), t.shape, t.stride()


class NotLinear(Exception):
    """Raised if two micro-batches run different operations, so that counts are not linear."""
