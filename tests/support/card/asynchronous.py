"""A device that lags behind the host, for runs on CPUs under DeepSpeed: it shows order, not speed.

DeepSpeed asks its accelerator whether the device is asynchronous; this one says that it is, so that
DeepSpeed uses streams and events as on CUDA. Each stream and each event has a vector clock, and
each operation is noted on the stream that it is given to. Two operations of which one writes what
the other reads or writes must be ordered by an event, or by a stream or event that the host waited
for: that the host happened to read a number between them, or waited for the whole device, orders
nothing here. Memory must not go while a stream that is not its own may still use it.

Everything is computed at once, on the CPU, so what is found does not depend on time. Collectives
run on a stream for each group, as NCCL's do.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from deepspeed.accelerator import real_accelerator
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator
from fake_cuda import COUNTS, READS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

COLLECTIVES = (
    *("all_reduce", "reduce", "broadcast", "all_gather", "all_gather_into_tensor"),
    *("reduce_scatter_tensor", "all_to_all_single"),
)
PACKAGES = ("fd_large", "deepspeed")
# What wraps a function rather than asks for something.
WRAPPERS = ("accelerator", "nvtx.py", "timer.py")

Clock = dict[int, int]


def later(clock: Clock, other: Clock) -> None:
    """Lets a clock know all that another one knows."""
    for stream, tick in other.items():
        clock[stream] = max(tick, clock.get(stream, 0))


class Stream:
    """Stands in for a stream of the accelerator."""

    number = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        Stream.number += 1
        self.id = Stream.number
        self.clock: Clock = {}
        # What others may still do with memory that went back to this stream: (stream, tick, what).
        self.beside: list[tuple[int, int, str]] = []

    def launch(self) -> None:
        """Gives an operation to this stream; it may be given memory that went before."""
        later(self.clock, DEVICE.host)
        for stream, tick, operation in self.beside:
            if self.clock.get(stream, 0) < tick:
                DEVICE.races.add(f"{caller()}: memory is given away that {operation} may still use")
        self.beside.clear()
        DEVICE.tick += 1
        self.clock[self.id] = DEVICE.tick

    def wait_stream(self, other: Stream) -> None:
        later(self.clock, other.clock)

    def wait_event(self, event: Event) -> None:
        later(self.clock, event.clock)

    def record_event(self, event: Event | None = None) -> Event:
        event = event or Event()
        event.record(self)
        return event

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        DEVICE.waited("stream")
        later(DEVICE.host, self.clock)


class Event:
    """Stands in for an event of the accelerator; the host never finds it over without a wait."""

    def __init__(self, *_: Any, **__: Any) -> None:
        self.clock: Clock = {}

    def record(self, stream: Stream | None = None) -> None:
        self.clock = dict((stream or DEVICE.stream).clock)

    def wait(self, stream: Stream | None = None) -> None:
        later((stream or DEVICE.stream).clock, self.clock)

    def query(self) -> bool:
        return False

    def synchronize(self) -> None:
        DEVICE.waited("event")
        later(DEVICE.host, self.clock)


class Memory:
    """A storage, and who has used it.

    Attributes:
        home: The stream that it was allocated on, and goes back to.
        is_on_device: Whether it holds a parameter, or what was computed from one.
        streams: Those that have used it.
        recorded: Those whose work it waits for before it is given away.
        uses: (stream, first byte, behind the last, whether it writes) -> (tick, operation).
        alive: Tells when it goes.
    """

    def __init__(self, home: Stream) -> None:
        self.home = home
        self.is_on_device = False
        self.streams: set[int] = set()
        self.recorded: set[Stream] = set()
        self.uses: dict[tuple[int, int, int, bool], tuple[int, str]] = {}
        self.alive: Any = None


class Device(TorchDispatchMode):
    """The device, and what is seen of it.

    Attributes:
        waits: What made the host wait for the device, as "what: file.function".
        races: Pairs of operations that no event orders, and memory that went too early.
    """

    def __init__(self) -> None:
        super().__init__()
        self.host: Clock = {}
        self.tick = 0
        self.streams: list[Stream] = []
        self.waits: list[str] = []
        self.races: set[str] = set()
        self._memories: dict[int, Memory] = {}
        self._of_groups: dict[Any, Stream] = {}

    @property
    def stream(self) -> Stream:
        """The present stream."""
        return self.streams[-1]

    def waited(self, what: str) -> None:
        self.waits.append(f"{what}: {caller()}")

    def memory(self, tensor: torch.Tensor) -> Memory:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._memories:
            self._memories[key] = Memory(self.stream)
            self._memories[key].alive = weakref.ref(storage, partial(self._freed, key))
        return self._memories[key]

    def _freed(self, key: int, _: Any) -> None:
        memory = self._memories.pop(key)
        known = {**self.host}
        for stream in (memory.home, *memory.recorded):
            later(known, stream.clock)
        memory.home.beside += [
            (stream, tick, operation)
            for (stream, *_), (tick, operation) in memory.uses.items()
            if known.get(stream, 0) < tick
        ]

    def use(self, stream: Stream, tensor: torch.Tensor, operation: str, *, writes: bool) -> None:
        """Notes that an operation, which was launched last on a stream, uses a tensor."""
        if tensor.numel() == 0:
            return
        memory, size = self.memory(tensor), tensor.element_size()
        memory.streams.add(stream.id)
        last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
        begin = tensor.storage_offset() * size
        end = begin + (last + 1) * size
        # Most memory is one stream's alone.
        for use, (tick, before) in memory.uses.items() if len(memory.streams) > 1 else ():
            other, low, high, wrote = use
            meet = (writes or wrote) and low < end and begin < high
            if meet and stream.clock.get(other, 0) < tick:
                does, did = ("writes" if one else "reads" for one in (writes, wrote))
                self.races.add(f"{caller()}: {operation} {does} what {before} {did} beside it")
        memory.uses[stream.id, begin, end, writes] = stream.clock[stream.id], operation

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if func.namespace == "c10d" or func.is_view:
            return out
        name, arguments = func._schema.name.partition("::")[2], func._schema.arguments
        named = {one.name: value for one, value in zip(arguments, args, strict=False)} | kwargs
        written = {one.name for one in arguments if one.alias_info and one.alias_info.is_write}
        used = [(x, key in written) for key, value in named.items() for x in tensors_in(value)]
        inputs = {x.untyped_storage()._cdata for x, _ in used}
        used += [(x, True) for x in tensors_in(out) if x.untyped_storage()._cdata not in inputs]
        self.stream.launch()
        on_device = any(
            isinstance(x, torch.nn.Parameter) or self.memory(x).is_on_device for x, _ in used
        )
        for tensor, writes in used:
            self.use(self.stream, tensor, name, writes=writes)
            self.memory(tensor).is_on_device |= on_device and writes
        if on_device and name in READS | COUNTS:
            self.waited("read")
        return out

    def collective(self, plain: Callable[..., Any]) -> Callable[..., Any]:
        """Returns a function of torch.distributed that runs on the stream of its group."""

        def called(*args: Any, async_op: bool = False, **kwargs: Any) -> Any:
            stream = self._of_groups.setdefault(kwargs.get("group"), Stream())
            tensors = tensors_in((args, kwargs))
            stream.wait_stream(self.stream)
            stream.launch()
            for tensor in tensors:
                self.use(stream, tensor, plain.__name__, writes=True)
            work = Work(plain(*args, async_op=True, **kwargs), stream, tensors)
            return work if async_op else work.wait()

        return called


class Work:
    """A collective, which the stream that is present at `wait` waits for, and no host."""

    def __init__(self, work: Any, stream: Stream, tensors: list[torch.Tensor]) -> None:
        self._work, self._tensors = work, tensors
        self._event = stream.record_event()

    def wait(self, *_: Any) -> None:
        if self._work is not None:
            self._work.wait()
        DEVICE.stream.wait_event(self._event)
        self._tensors = []


def tensors_in(tree: Any) -> list[torch.Tensor]:
    """Returns the tensors of a tree that have values; those on the meta device have none."""
    leaves = tree_leaves(tree)
    return [x for x in leaves if isinstance(x, torch.Tensor) and x.device.type == "cpu"]


def caller() -> str:
    """Returns the innermost function of fd_large or DeepSpeed that is running."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        # Comprehensions have a frame of their own until Python 3.12.
        inside = {*path.parts} & {*PACKAGES} and not frame.f_code.co_name.startswith("<")
        if inside and not any(name in path.parts for name in WRAPPERS):
            return f"{path.stem}.{frame.f_code.co_name}"
        frame = frame.f_back
    return "nobody"


class Accelerator(CPU_Accelerator):
    """DeepSpeed's accelerator of CPUs, as asynchronous as CUDA's."""

    Stream = property(lambda self: Stream)
    Event = property(lambda self: Event)

    def is_synchronized_device(self) -> bool:
        return False

    def use_host_timers(self) -> bool:
        return True

    def resolves_data_dependency(self) -> bool:
        return False

    def handles_memory_backpressure(self) -> bool:
        return False

    def current_stream(self, device_index: Any = None) -> Stream:
        return DEVICE.stream

    def default_stream(self, device_index: Any = None) -> Stream:
        return DEVICE.streams[0]

    @contextmanager
    def stream(self, stream: Stream) -> Iterator[None]:
        DEVICE.streams.append(stream)
        try:
            yield
        finally:
            DEVICE.streams.pop()

    def synchronize(self, device_index: Any = None) -> None:
        DEVICE.waited("device")


def record_stream(tensor: torch.Tensor, stream: Stream) -> None:
    DEVICE.memory(tensor).recorded.add(stream)


def tolist(tensor: torch.Tensor) -> Any:
    if DEVICE.memory(tensor).is_on_device:
        DEVICE.waited("read")
    return plain_tolist(tensor)


plain_tolist = torch.Tensor.tolist
DEVICE = Device()


def of_torch() -> dict[str, Any]:
    """What stands in for functions of torch.cuda, by name."""
    accelerator = Accelerator()
    return {
        "Stream": Stream,
        "current_stream": accelerator.current_stream,
        "stream": accelerator.stream,
    }


def install() -> Device:
    """Makes the device that of this process, for good; returns it, to be entered."""
    DEVICE.streams.append(Stream())
    real_accelerator.set_accelerator(Accelerator())
    for name, stand_in in of_torch().items():
        setattr(torch.cuda, name, stand_in)
    torch.Tensor.record_stream, torch.Tensor.tolist = record_stream, tolist
    for name in COLLECTIVES:
        plain = getattr(torch.distributed, name)
        setattr(torch.distributed, name, DEVICE.collective(plain))
    return DEVICE
