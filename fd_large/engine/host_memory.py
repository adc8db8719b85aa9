"""Host memory, as the C library and the kernel of Linux manage it; elsewhere nothing is done."""

from __future__ import annotations

import ctypes
import logging
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

log = logging.getLogger(__name__)


def give_back() -> None:
    """Gives freed memory back to the system: building a model leaves holes between what stays."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(ctypes.c_size_t(0))


@contextmanager
def kept_from_children(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Keeps tensors in host memory out of processes that are forked in the block.

    A forked process has the pages of its parent as they were: each that the parent writes
    afterwards is in memory twice. A child that reads such a tensor is ended by a signal.

    Args:
        tensors: What the children do not need.
    """
    advise = getattr(ctypes.CDLL(None, use_errno=True), "madvise", None)
    if advise is None or not hasattr(mmap, "MADV_DONTFORK"):
        yield
        return
    kept = [span for span in _pages(tensors) if _advised(advise, span, mmap.MADV_DONTFORK)]
    log.debug("kept from loading processes: %.2f GB", sum(size for _, size in kept) / 1e9)
    try:
        yield
    finally:
        # The memory may be freed, and taken by what the next children need.
        for span in kept:
            _advised(advise, span, mmap.MADV_DOFORK)


def _pages(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
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


def _advised(advise: Callable[..., int], span: tuple[int, int], advice: int) -> bool:
    """Gives the kernel advice on (address, bytes); returns whether it takes it."""
    address, size = span
    if advise(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(advice)) == 0:
        return True
    log.debug("madvise(%d): %s", advice, os.strerror(ctypes.get_errno()))
    return False
