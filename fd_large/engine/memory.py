"""Measures and releases the memory of a rank, and names a remedy when it runs out.

Host memory is measured and released by interfaces of Linux and of its C library.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import mmap
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fd_large.errors import FDError
from fd_large.ranks import distributed

log = logging.getLogger(__name__)


class OutOfMemory(FDError):
    """Raised if a step or models do not fit into memory; the message names a setting to change."""

    rank_local = True


class GpuMemory:
    """Measures the memory of torch's allocator on this rank's GPU, in bytes."""

    def reset(self) -> None:
        """Starts to measure a new peak."""
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()

    def peak(self) -> int:
        """Returns the largest number of bytes that was reserved at a time since `reset`."""
        torch.cuda.synchronize()
        return torch.cuda.max_memory_reserved()

    def capacity(self) -> int:
        """Returns the bytes that this process could reserve: free and already reserved memory."""
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved()


class HostMemory:
    """Measures the resident memory of a CPU rank's process on Linux, in bytes."""

    def reset(self) -> None:
        """Starts to measure a new peak: writing 5 to /proc/self/clear_refs resets VmHWM."""
        gc.collect()
        Path("/proc/self/clear_refs").write_text("5")

    def peak(self) -> int:
        """Returns the largest resident size since `reset`, in bytes."""
        return _proc_bytes("self/status", "VmHWM")

    def capacity(self) -> int:
        """Returns this rank's share of available host memory plus its resident memory, in bytes."""
        available = _proc_bytes("meminfo", "MemAvailable")
        resident = _proc_bytes("self/status", "VmRSS")
        return available // max(1, distributed.local_world_size()) + resident


def free_bytes() -> int:
    """Returns the free bytes of the current GPU, or of host memory if there is no GPU."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    return _proc_bytes("meminfo", "MemAvailable")


def memory_setting() -> dict[str, Any]:
    """Returns {"device": name of this rank's device, "memory_bytes": least memory of any rank's}.

    All ranks must call this function.
    """
    device = distributed.device()
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        name, total = properties.name, properties.total_memory
    else:
        name, total = "cpu", _proc_bytes("meminfo", "MemTotal")
    return {"device": name, "memory_bytes": -distributed.max_rank(-total)}


def _proc_bytes(file: str, key: str) -> int:
    """Returns the value of the line `key` in the file /proc/`file`, converted from kB to bytes."""
    path = Path("/proc", file)
    for line in path.read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"{path} has no {key}")


@contextmanager
def building_in_memory(remedy: str = "", *, subject: str = "the models are") -> Iterator[None]:
    """Turns an out-of-memory error in the block, which builds models, into an `OutOfMemory`.

    Args:
        remedy: A flag that saves memory, which the message names besides ZeRO; "" for none.
        subject: The models being built, with a verb, for the message.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        raise OutOfMemory(
            f"engine: out of memory on rank {distributed.rank()} while {subject} built; got too "
            "little memory, expected room for all tensors. Use ds_configs/zero3.json or "
            f"zero3_offload.json, {remedy}{', ' if remedy else ''}or more ranks."
        ) from error


@contextmanager
def out_of_memory_named(size: int) -> Iterator[None]:
    """Turns an out-of-memory error in the block into an `OutOfMemory` that names what to try next.

    `size` is the micro batch size that was tried.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        smaller = size // 2
        remedy = (
            f"Set --batch.micro_batch_size {smaller}"
            if smaller
            else "Set --student.activation_checkpointing every, or use more GPUs"
        )
        raise OutOfMemory(
            f"batch.micro_batch_size: out of memory on rank {distributed.rank()}; got {size} "
            f"images per micro batch, expected fewer images. {remedy}."
        ) from error


def _is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    # Torch's CPU allocator raises a plain RuntimeError.
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate" in str(error)


def give_back() -> None:
    """Returns freed heap memory to the system; building a model leaves holes in the heap."""
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(ctypes.c_size_t(0))


@contextmanager
def kept_from_children(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Keeps tensors in host memory out of processes that are forked in the block.

    A forked process shares its parent's pages, and each page that the parent writes afterwards is
    in memory twice. A child that reads one of these tensors is ended by a signal.
    """
    advise = getattr(ctypes.CDLL(None, use_errno=True), "madvise", None)
    if advise is None or not hasattr(mmap, "MADV_DONTFORK"):
        yield
        return
    spans = [span for span in _pages(tensors) if _advised(advise, span, mmap.MADV_DONTFORK)]
    log.debug(
        "%.2f GB of memory are not copied to loading processes",
        sum(size for _, size in spans) / 1e9,
    )
    try:
        yield
    finally:
        # The allocator may reuse this memory for tensors that later children need.
        for span in spans:
            _advised(advise, span, mmap.MADV_DOFORK)


def _pages(tensors: Iterable[Tensor]) -> list[tuple[int, int]]:
    """Returns (address, bytes) of the whole memory pages of each tensor in host memory."""
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
    """Calls `advise`, which is madvise, on an (address, bytes); returns whether the call succeeded.

    `advice` is the number of the advice, such as MADV_DONTFORK. A failure is logged.
    """
    address, size = span
    if advise(ctypes.c_void_p(address), ctypes.c_size_t(size), ctypes.c_int(advice)) == 0:
        return True
    log.debug("madvise(%d): %s", advice, os.strerror(ctypes.get_errno()))
    return False
