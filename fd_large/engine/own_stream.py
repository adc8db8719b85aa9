"""Results that a CUDA stream of its own computes, beside what the current stream does next.

A replicated teacher's forward needs no collective, while the student's forward under ZeRO-3 waits
for the gathers of its parameters: on a stream of its own, the teacher computes in these waits. The
kernels and their order within a stream are the same, and so are the results, to the bit.

The streams meet in two places. What is begun here waits for all that the current stream was asked
before, by which its inputs are there. The first look at a result has the stream that looks wait.
Each stream tells the allocator of memory of the other that it reads, or this would be given away
while it is read.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TypeVar

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

T = TypeVar("T")

_streams: dict[torch.device, torch.cuda.Stream] = {}


def beside(
    compute: Callable[[], Mapping[str, T]], inputs: object, device: torch.device
) -> Mapping[str, T]:
    """Returns what `compute` does, which on a GPU another stream may still be at when this returns.

    Args:
        compute: Returns tensors, or tuples of these, by name; makes no collective.
        inputs: The tensors that it reads, but for those that live as long as the run; in tuples,
            lists or dicts.
        device: Where it computes; on others than GPUs it is done when this returns.
    """
    if device.type != "cuda":
        return compute()
    stream = _streams.setdefault(device, torch.cuda.Stream(device))
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        found = compute()
    _tell(inputs, stream)
    return _Awaited(found, stream, device)


def _tell(tensors: object, stream: torch.cuda.Stream) -> None:
    """Keeps the memory of tensors from being given away before a stream has read them."""
    for tensor in tree_leaves(tensors):
        if isinstance(tensor, Tensor) and tensor.device.type == "cuda":
            tensor.record_stream(stream)


class _Awaited(Mapping[str, T]):
    """Results of another stream, for which the first stream that looks at one waits."""

    def __init__(
        self, found: Mapping[str, T], stream: torch.cuda.Stream, device: torch.device
    ) -> None:
        self._found, self._stream, self._device = dict(found), stream, device
        self._is_there = False

    def __getitem__(self, name: str) -> T:
        if not self._is_there:
            reader = torch.cuda.current_stream(self._device)
            reader.wait_stream(self._stream)
            _tell(self._found, reader)
            self._is_there = True
        return self._found[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._found)

    def __len__(self) -> int:
        return len(self._found)
