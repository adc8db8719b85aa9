"""Packs all tensors of a batch into one tensor, for the transfer from a loading process.

Each tensor in shared memory takes a file descriptor in the loading process and in the training
process for as long as the tensor lives. A batch of images with objects has hundreds of tensors,
several batches are in transit, and the system often allows a process only a thousand descriptors.
"""

from __future__ import annotations

import io
import math
import pickle
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import get_worker_info

_ALIGNMENT = 64

_Layout = list[tuple[torch.dtype, tuple[int, ...], int]]
"""Data type, shape, and offset of the first byte of each tensor in the joined tensor."""


def parcel(batch: Any) -> Any:
    """Packs a batch for the transfer to the training process, where unpickling unpacks the batch.

    Outside of a loading process, the batch is returned as it is. A batch is anything that can be
    pickled; its tensors arrive contiguous.
    """
    return batch if get_worker_info() is None else _Parcel(batch)


class _Parcel:
    def __init__(self, batch: Any) -> None:
        self._batch = batch

    def __reduce__(self) -> tuple[Any, ...]:
        without, tensors = io.BytesIO(), []
        _Pickler(without, tensors).dump(self._batch)
        return _unpacked, (without.getvalue(), *_joined(tensors))


class _Pickler(pickle.Pickler):
    """A pickler that collects tensors instead of pickling them."""

    def __init__(self, file: io.BytesIO, tensors: list[Tensor]) -> None:
        super().__init__(file, pickle.HIGHEST_PROTOCOL)
        self._tensors = tensors

    def persistent_id(self, value: Any) -> int | None:
        if not isinstance(value, Tensor):
            return None
        self._tensors.append(value)
        return len(self._tensors) - 1


class _Unpickler(pickle.Unpickler):
    def __init__(self, file: io.BytesIO, tensors: Sequence[Tensor]) -> None:
        super().__init__(file)
        self._tensors = tensors

    def persistent_load(self, number: int) -> Tensor:
        return self._tensors[number]


def _joined(tensors: Sequence[Tensor]) -> tuple[Tensor, _Layout]:
    layout: _Layout = []
    size = 0
    for tensor in tensors:
        layout.append((tensor.dtype, tuple(tensor.shape), size))
        size += -(-tensor.nbytes // _ALIGNMENT) * _ALIGNMENT
    joined = torch.empty(size, dtype=torch.uint8).share_memory_()
    for tensor, place in zip(tensors, _split(joined, layout), strict=True):
        place.copy_(tensor)
    return joined, layout


def _split(joined: Tensor, layout: _Layout) -> list[Tensor]:
    return [
        joined[start : start + math.prod(shape) * dtype.itemsize].view(dtype).view(shape)
        for dtype, shape, start in layout
    ]


def _unpacked(without: bytes, joined: Tensor, layout: _Layout) -> Any:
    return _Unpickler(io.BytesIO(without), _split(joined, layout)).load()
