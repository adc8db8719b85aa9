"""The storages of all tensors that a process holds; used by tests and benchmarks of memory."""

from __future__ import annotations

import gc
from contextlib import suppress

import torch


def storages() -> dict[int, int]:
    """Returns the bytes of every tensor's storage in this process, by its address."""
    gc.collect()
    found = {}
    for thing in gc.get_objects():
        # type() rather than isinstance: lazy proxies must not be woken.
        if type(thing) in (torch.Tensor, torch.nn.Parameter) and thing.device.type != "meta":
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None:
                    storage = tensor.untyped_storage()
                    # torch.compile keeps tensors that stand for others while it traces: no memory.
                    with suppress(RuntimeError):
                        found[storage.data_ptr()] = storage.nbytes()
    return found
