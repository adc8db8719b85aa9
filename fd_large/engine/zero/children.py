"""What training writes is not for the processes that load images.

A forked process has the pages of its parent as they were. Each page that training writes afterwards
is then in memory twice: for SwinV2-G on a CPU 6.7 GB more after the first step, and as much for the
float32 state that `offload_optimizer` keeps in host memory. Pages that are kept from a child are
not in its memory at all, and it has no use for them.
"""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

from fd_large.engine.zero import partition, state
from fd_large.engine.zero.engine import Engine

log = logging.getLogger(__name__)


@contextmanager
def kept_from_children(engines: Iterable[Engine]) -> Iterator[None]:
    """Keeps what training writes from processes that are forked in the block; on Linux.

    A child that reads such a tensor is ended by a signal.

    Args:
        engines: Their weights, masters, moments and gradients in host memory are kept.
    """
    advise = getattr(ctypes.CDLL(None, use_errno=True), "madvise", None)
    if advise is None or not hasattr(mmap, "MADV_DONTFORK"):
        yield
        return
    spans = _whole_pages(tensor for engine in engines for tensor in _written(engine))
    kept = [span for span in spans if _advised(advise, span, mmap.MADV_DONTFORK)]
    log.debug("kept from loading processes: %.2f GB", sum(size for _, size in kept) / 1e9)
    try:
        yield
    finally:
        # The memory may be freed, and taken by what the next children need.
        for span in kept:
            _advised(advise, span, mmap.MADV_DOFORK)


def _written(engine: Engine) -> Iterator[Tensor]:
    """The tensors of an engine that are not the same after a step."""
    optimizer = engine.deepspeed.optimizer
    if engine.stage == 3:
        yield optimizer.grad_partitions_flat_buffer
    yield from getattr(optimizer, "fp32_groups_gradients_flat", ())  # Stage 1 in bfloat16.
    for parameter in engine.task.parameters():
        yield parameter.ds_tensor if partition.is_partitioned(parameter) else parameter.data
    for _, owner, _, _ in state.owned(engine):
        gradient = [] if owner.grad is None else [owner.grad]
        moments = engine.gate.inner.state.get(owner, {}).values()
        yield from (owner.data, *gradient, *(one for one in moments if isinstance(one, Tensor)))


def _whole_pages(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Returns (address, bytes) of the whole pages of tensors' storages in host memory."""
    spans = {}
    for tensor in tensors:
        if tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            begin = -(-storage.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
            end = (storage.data_ptr() + storage.nbytes()) // mmap.PAGESIZE * mmap.PAGESIZE
            if begin < end:
                spans[begin] = end - begin
    return list(spans.items())


def _advised(advise: ctypes._NamedFuncPointer, span: tuple[int, int], advice: int) -> bool:
    """Gives the kernel advice on (address, bytes); returns whether it takes it."""
    address, size = span
    if advise(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(advice)) == 0:
        return True
    log.debug("madvise(%d): %s", advice, os.strerror(ctypes.get_errno()))
    return False
