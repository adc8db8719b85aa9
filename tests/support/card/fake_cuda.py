"""A card that is not here: tensors that say they are on cuda:0, and stand-ins for torch.cuda.

The values of such a tensor lie on the CPU, where each operation is done; what a CUDA build would
refuse is refused: tensors of two devices, numpy, and a few cases that only CPU kernels take. So
code runs as on a GPU, data-dependent shapes too, and a tensor that was left on the CPU shows. What
makes the host wait for the device is noted, with the function of fd_large that asked for it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode, return_and_correct_aliasing
from torch.utils._pytree import tree_flatten, tree_map_only, tree_unflatten

from fd_large.kernels import choose, operation

PACKAGE = str(Path(__file__).parents[3] / "fd_large")
CARD = torch.device("cuda", 0)
GB = 2**30

# The shape of what they return is in the values, which the host therefore reads.
COUNTS = {
    *("nonzero", "masked_select", "_unique2", "unique_dim", "unique_consecutive"),
    *("repeat_interleave", "bincount", "nms"),
}
READS = {"_local_scalar_dense", "equal", "is_nonzero"}
# A CPU tensor may index one on the device, at the price of a copy.
INDEXING = {"index", "index_put", "index_put_", "_index_put_impl_"}
COPIES = {"_to_copy", "copy_"}
# On CUDA these have no kernel for whole numbers.
REAL_ONLY = {"mm", "bmm", "addmm", "baddbmm", "convolution"}


class CardTensor(torch.Tensor):
    """A tensor that says it is on cuda:0.

    To C++ it is on the meta device, which needs no driver; Python sees `device`.

    Attributes:
        values: The same tensor on the CPU.
    """

    values: torch.Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl
    device = property(lambda self: CARD)
    is_cuda = property(lambda self: True)
    is_cpu = is_meta = property(lambda self: False)

    @property
    def data(self) -> torch.Tensor:
        return self.detach()

    @data.setter
    def data(self, new: CardTensor) -> None:
        torch._C.TensorBase.data.__set__(self, new)
        self.values = new.values

    @staticmethod
    def __new__(cls, values: torch.Tensor) -> CardTensor:
        tensor = torch.Tensor._make_wrapper_subclass(
            cls,
            values.shape,
            strides=values.stride(),
            storage_offset=values.storage_offset(),
            dtype=values.dtype,
            device="meta",
        )
        tensor.values = values
        return tensor

    def __repr__(self, **_: Any) -> str:
        return f"{self.values!r} on {CARD}"

    def numpy(self, **_: Any) -> Any:
        raise TypeError("can't convert cuda:0 device type tensor to numpy; use Tensor.cpu() first")

    __array__ = numpy

    def tolist(self) -> Any:
        return self.cpu().tolist()

    def new_tensor(self, data: Any, dtype: Any = None, device: Any = CARD) -> torch.Tensor:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device)

    def get_device(self) -> int:
        return 0

    def is_pinned(self, *_: Any) -> bool:
        return False

    def record_stream(self, stream: Stream) -> None:
        assert isinstance(stream, Stream)
        card_of_thread().notes.append(f"record_stream {stream.name}")

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return run(func, args, kwargs or {}, note=lambda what: None)


def is_function(code: Any) -> bool:
    """Says whether code is a named function of fd_large.

    Comprehensions have code of their own until Python 3.12, and are their function's here.
    """
    return code.co_filename.startswith(PACKAGE) and not code.co_name.startswith("<")


def on_card(tensor: torch.Tensor) -> CardTensor:
    """Returns a copy on the card."""
    return CardTensor(tensor.detach().clone())


def name_of(func: Any) -> str:
    return func._schema.name.partition("::")[2]


def run(func: Any, args: Any, kwargs: Any, note: Callable[[str], None]) -> Any:
    """Does an operation on the CPU as the card would do it."""
    leaves, spec = tree_flatten((args, kwargs))
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    there = [tensor for tensor in tensors if isinstance(tensor, CardTensor)]
    name, asked = name_of(func), kwargs.get("device")
    if asked is not None:
        kind = torch.device(asked).type
        # C++ asks for what it knows these tensors by, unless somebody counts on the meta device.
        goes_there = kind == "cuda" or (kind == "meta" and choose.stood_for() is None)
    elif name == "copy_":
        goes_there = isinstance(args[0], CardTensor)
    else:
        goes_there = bool(there)
    if not there and not goes_there:
        return func(*args, **kwargs)
    check(func, args, tensors, there)
    if torch.Tag.nondeterministic_seeded in func.tags:
        card_of_thread().draws.append(name)
    if there and not goes_there and is_late(func, args, kwargs):
        source = there[0].values.clone()
        target = args[0] if name == "copy_" else torch.zeros_like(source)
        card_of_thread().late.append((target, source))
        return target
    if (waits := waits_for(func, args, kwargs, tensors, there, goes_there)) is not None:
        note(waits)
    if kwargs.get("generator") is not None and not there:
        raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
    plain_args, plain_kwargs = tree_unflatten([_on_cpu(leaf) for leaf in leaves], spec)
    if func.namespace == "fd_large":
        # A fused kernel: its shapes and types, which are what can be known without a card.
        out = _empty(func, plain_args, plain_kwargs)
    else:
        out = func(*plain_args, **plain_kwargs)
    if not goes_there:
        return args[0] if name == "copy_" else out
    out = tree_map_only(
        torch.Tensor, lambda x: x if isinstance(x, CardTensor) else CardTensor(x), out
    )
    return return_and_correct_aliasing(func, args, kwargs, out) if there else out


def check(func: Any, args: Any, tensors: list[Any], there: list[Any]) -> None:
    """Refuses what a CUDA build refuses and this CPU would do."""
    name = name_of(func)
    here = [tensor for tensor in tensors if not isinstance(tensor, CardTensor)]
    if here and there and name not in COPIES:
        # A number on the CPU is taken as a number, by operations that work element by element.
        numbers = all(tensor.ndim == 0 for tensor in here) and isinstance(args[0], CardTensor)
        pointwise = torch.Tag.pointwise in func.tags or name in ("fill_", "masked_fill")
        indexing = name in INDEXING and isinstance(args[0], CardTensor)
        if not (indexing or (numbers and pointwise)):
            raise RuntimeError(
                f"Expected all tensors to be on the same device, but found cpu and {CARD} ({func})"
            )
    if name == "native_layer_norm":
        kinds = {tensor.dtype for tensor in tensors}
        if len(kinds) > 1:
            raise RuntimeError(f"native_layer_norm on CUDA: one type expected, found {kinds}")
    whole = tensors and not (tensors[0].is_floating_point() or tensors[0].is_complex())
    if whole and (name in REAL_ONLY or name.startswith("_upsample")):
        raise RuntimeError(f"{func} is not implemented for {tensors[0].dtype} on CUDA")


def waits_for(
    func: Any, args: Any, kwargs: Any, tensors: list[Any], there: list[Any], goes_there: bool
) -> str | None:
    """Says how an operation makes the host wait for the device; None: it does not."""
    name = name_of(func)
    if name in READS | COUNTS:
        return name
    if name in INDEXING:
        indices = [index for index in args[1] if index is not None]
        if any(index.dtype in (torch.bool, torch.uint8) for index in indices):
            return "index by a mask"
        if not all(isinstance(index, CardTensor) for index in indices):
            return "index from the CPU"
    if name in COPIES:
        source = args[1] if name == "copy_" else args[0]
        host = args[0] if name == "copy_" else None
        if isinstance(source, CardTensor) == goes_there:
            return None
        beside = kwargs.get("non_blocking", False) or (name == "copy_" and args[2:] == (True,))
        pinned = is_pinned(host if host is not None and not goes_there else source)
        if not goes_there:
            return None if beside and pinned else "copy to the CPU"
        # Memory that is not pinned is copied along with the call only where it is small.
        if not beside or (not pinned and source.nbytes > 2**16):
            return "copy from the CPU"
    return None


def is_late(func: Any, args: Any, kwargs: Any) -> bool:
    """Says whether a copy to the CPU returns before the memory holds what was copied."""
    beside = kwargs.get("non_blocking", False) or args[2:] == (True,)
    # Memory that `to` makes for such a copy is pinned.
    return beside and (
        name_of(func) == "_to_copy" or (name_of(func) == "copy_" and is_pinned(args[0]))
    )


def _on_cpu(leaf: Any) -> Any:
    if isinstance(leaf, torch.device):
        return torch.device("cpu")
    return leaf.values if isinstance(leaf, CardTensor) else leaf


def _empty(func: Any, args: Any, kwargs: Any) -> Any:
    to_meta = tree_map_only(torch.Tensor, lambda x: x.to("meta"), (args, kwargs))
    out = func(*to_meta[0], **to_meta[1])
    return tree_map_only(torch.Tensor, lambda x: torch.zeros_like(x, device="cpu"), out)


def is_pinned(tensor: torch.Tensor) -> bool:
    """Says whether the memory of a CPU tensor came from `pin_memory`."""
    if isinstance(tensor, CardTensor):
        return False
    return getattr(tensor.untyped_storage(), "page_locked", False)


def pinned(tensor: torch.Tensor) -> torch.Tensor:
    """Stands in for `Tensor.pin_memory`, also in other threads."""
    if isinstance(tensor, CardTensor):
        raise RuntimeError(
            "cannot pin 'torch.cuda.FloatTensor' only dense CPU tensors can be pinned"
        )
    copy = tensor.clone()
    copy.untyped_storage().page_locked = True
    return copy


class Stream:
    """Stands in for torch.cuda.Stream."""

    def __init__(self, device: Any = None, *, name: str = "side") -> None:
        self.name = name

    def is_capturing(self) -> bool:
        return False

    def wait_stream(self, other: Stream) -> None:
        card_of_thread().notes.append(f"{self.name} waits for {other.name}")

    def synchronize(self) -> None:
        card_of_thread().waits.append("synchronize")
        card_of_thread().arrive()


class Card(TorchDispatchMode):
    """The card: inside it, what is asked for on cuda:0 is made there.

    Attributes:
        waits: What made the host wait, as "file.function: what".
        notes: What was asked of streams and of the allocator, in order.
        late: Memory of the CPU that copies without a wait will fill, each with its values: it is
            filled once somebody waits for the device.
        draws: Operations that the card's generator would have drawn for.
        fused: The fused kernels that were called; their results are zeros.
        capability, name, free, total, reserved: What torch.cuda says of the card.
    """

    def __init__(self) -> None:
        super().__init__()
        self.waits: list[str] = []
        self.notes: list[str] = []
        self.late: list[tuple[torch.Tensor, torch.Tensor]] = []
        self.draws: list[str] = []
        self.fused: set[str] = set()
        self.capability, self.name = (9, 0), "NVIDIA H100 80GB HBM3"
        self.free, self.total, self.reserved, self.peak = 60 * GB, 80 * GB, 4 * GB, 5 * GB
        self.streams = [Stream(name="main")]

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "fd_large":
            self.fused.add(name_of(func))
        kwargs = kwargs or {}
        if not kwargs.get("pin_memory"):
            return run(func, args, kwargs, self._note)
        out = run(func, args, {**kwargs, "pin_memory": False}, self._note)
        out.untyped_storage().page_locked = True
        return out

    def _note(self, what: str) -> None:
        frame: Any = sys._getframe(1)
        while frame is not None and not is_function(frame.f_code):
            frame = frame.f_back
        where = f"{Path(frame.f_code.co_filename).stem}.{frame.f_code.co_name}" if frame else "test"
        self.waits.append(f"{where}: {what}")
        self.arrive()

    def arrive(self) -> None:
        """Fills the memory that copies without a wait go to."""
        for target, values in self.late:
            torch.Tensor.copy_(target, values)
        self.late.clear()

    @contextmanager
    def waiting(self) -> Iterator[list[str]]:
        """Gives what made the host wait inside the block."""
        before, self.waits = self.waits, []
        seen = self.waits
        try:
            yield seen
        finally:
            self.waits = before + seen


def _to(to: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
    """`Tensor.to` with "cuda" as cuda:0: C++ would ask a driver for the index."""

    def indexed(value: Any) -> Any:
        is_device = isinstance(value, (str, torch.device))
        return CARD if is_device and torch.device(value).type == "cuda" else value

    def moved(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return to(tensor, *map(indexed, args), **{k: indexed(v) for k, v in kwargs.items()})

    return moved


_cards: list[Card] = []


def card_of_thread() -> Card:
    """Returns the card of the running test."""
    return _cards[-1]


@contextmanager
def fake_cuda() -> Iterator[Card]:
    """A machine with one card, until the block ends."""
    card, patch = Card(), pytest.MonkeyPatch()
    _cards.append(card)
    for name, stand_in in stand_ins(card).items():
        patch.setattr(torch.cuda, name, stand_in)
    # torch's optimisers ask for it in a build for CUDA.
    patch.setattr(torch.accelerator, "current_stream", lambda device=None: card.streams[-1])
    # Without a card there is nothing to compile for.
    patch.setattr(operation, "_compiled", lambda op, reference, *_: reference)
    patch.setattr(torch.Tensor, "pin_memory", pinned)
    patch.setattr(torch.Tensor, "to", _to(torch.Tensor.to))
    patch.setattr(torch.Tensor, "is_pinned", is_pinned)
    # DeepSpeed's own switch, which start.py sets on a machine without a card.
    patch.setenv("DS_ACCELERATOR", "cuda")
    # torch.tensor(..., device="cuda") makes a CPU tensor and moves it, which the mode then sees.
    before = torch._C._only_lift_cpu_tensors()
    torch._C._set_only_lift_cpu_tensors(True)
    choose.reset()
    try:
        with card:
            yield card
    finally:
        choose.reset()
        torch._C._set_only_lift_cpu_tensors(before)
        _cards.pop()
        patch.undo()


def stand_ins(card: Card) -> dict[str, Any]:
    """What replaces functions of torch.cuda, by name."""

    @contextmanager
    def stream(entered: Stream) -> Iterator[None]:
        card.streams.append(entered)
        yield
        card.streams.pop()

    def note(what: str, value: Any = None) -> Callable[..., Any]:
        def called(*_: Any, **__: Any) -> Any:
            card.notes.append(what)
            return value

        return called

    def synchronize(device: Any = None) -> None:
        card.notes.append("synchronize")
        card.arrive()

    properties = SimpleNamespace(
        name=card.name, major=9, minor=0, total_memory=card.total, multi_processor_count=132
    )

    @contextmanager
    def device(chosen: torch.device) -> Iterator[None]:
        card.notes.append(f"device {chosen}")
        yield

    return {
        "device": device,
        "_lazy_init": lambda: None,
        "is_available": lambda: True,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "set_device": note("set_device"),
        "get_device_capability": lambda device=None: card.capability,
        "get_device_name": lambda device=None: card.name,
        "get_device_properties": lambda device=None: properties,
        "Stream": Stream,
        "stream": stream,
        "current_stream": lambda device=None: card.streams[-1],
        "synchronize": synchronize,
        "empty_cache": note("empty_cache"),
        "reset_peak_memory_stats": note("reset_peak_memory_stats"),
        "max_memory_allocated": lambda device=None: card.peak,
        "max_memory_reserved": lambda device=None: card.peak,
        "memory_reserved": lambda device=None: card.reserved,
        "mem_get_info": lambda device=None: (card.free, card.total),
    }
