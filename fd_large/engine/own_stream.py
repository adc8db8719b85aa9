"""Runs work on a separate CUDA stream, concurrently with later work of the current stream.

A replicated teacher's forward needs no collective, while the student's forward under ZeRO-3 waits
for the gathers of its parameters: on a separate stream, the teacher computes in these waits. The
kernels and their order within a stream are the same, and so are the results, to the bit.

The streams meet in two places. New work waits for everything queued before on the current stream,
so that the inputs of the work are ready. The stream that first reads a result waits for the work.
If a stream reads memory of the other stream, the allocator is told, because it could otherwise
reuse the memory too early.
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
    """Returns the result of `compute`, which on a GPU may still be running on another stream.

    Args:
        compute: Returns tensors, or tuples of tensors, by name; makes no collective.
        inputs: Tuple, list or dict of the tensors that `compute` reads, without tensors that live
            as long as the run.
        device: Device of the computation. If it is not a GPU, `compute` has finished on return.
    """
    if not _has_streams(device):
        return compute()
    stream = _streams.setdefault(device, torch.cuda.Stream(device))
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        results = compute()
    _tell(inputs, stream)
    return _Awaited(results, stream, device)


def _has_streams(device: torch.device) -> bool:
    return device.type == "cuda"


def _tell(tensors: object, stream: torch.cuda.Stream) -> None:
    """Keeps the allocator from reusing the GPU memory of `tensors` before `stream` has read it.

    `tensors` is a tensor, or a nest of tuples, lists and dicts.
    """
    for tensor in tree_leaves(tensors):
        if isinstance(tensor, Tensor) and _has_streams(tensor.device):
            tensor.record_stream(stream)


class _Awaited(Mapping[str, T]):
    """Results of work on another stream; a stream that reads a result first waits for the work."""

    def __init__(
        self, results: Mapping[str, T], stream: torch.cuda.Stream, device: torch.device
    ) -> None:
        self._results, self._stream, self._device = dict(results), stream, device
        self._is_there = False

    def __getitem__(self, name: str) -> T:
        if not self._is_there:
            reader = torch.cuda.current_stream(self._device)
            reader.wait_stream(self._stream)
            _tell(self._results, reader)
            self._is_there = True
        return self._results[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._results)

    def __len__(self) -> int:
        return len(self._results)
