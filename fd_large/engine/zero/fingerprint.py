"""Computes 64-bit hashes of the weights that a module, or a rank's part of a module, holds.

A hash is the sum over elements of (bits + 1) * odd modulo 2^64; `odd` is an odd number that depends
on the element's position and the tensor's name. Since the hash is a sum, each rank can hash its own
elements, and one all-reduce adds the hashes up. A single changed element changes the sum. The hash
is not cryptographic.
"""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from fd_large.engine.zero.partition import is_partitioned, shard
from fd_large.ranks import distributed

_BITS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.uint8: torch.uint8,
}
_CHUNK = 1 << 22  # Elements hashed at once on a GPU: 32 MiB of int64 beside the parameter.
_CHUNK_ON_CPU = 1 << 15  # They stay in the cache of one core, which is ten times as fast.


def fingerprint(module: nn.Module, *, group: Any = None) -> str:
    """Hashes all parameters and floating-point buffers, independently of how they are sharded.

    If parameters are sharded, all ranks of the group must call this function. Returns 16
    hexadecimal digits.

    Args:
        module: A module with whole or partitioned parameters.
        group: Process group over which the parameters are sharded; None for all ranks.
    """
    total = torch.zeros((), dtype=torch.int64)
    partitioned = False
    for name, parameter in module.named_parameters():
        elements, offset = shard(parameter)
        partitioned |= is_partitioned(parameter)
        total += _hash(name, elements, offset).cpu()
    if partitioned:
        total = distributed.sum_tensor(total, group=group)
    for name, buffer in module.named_buffers():  # Whole on every rank: once, after the sum.
        if buffer.is_floating_point():
            total += _hash(name, buffer.view(-1), 0).cpu()
    return _digits(total)


def held_fingerprint(module: nn.Module, whole: dict[str, Tensor]) -> str:
    """Hashes this rank's part of a module, without a collective.

    The part consists of the rank's shards, all buffers, and the tensors that ZeRO-3 keeps whole
    besides the shards.

    Args:
        module: A module with whole or partitioned parameters.
        whole: {name: hash} of the tensors that ZeRO-3 keeps whole, stored by the first call that
            finds them. Later calls add only the change of this hash, so that the result does not
            depend on the forward at which DeepSpeed gathers the tensor.

    Returns: "PART/PARTS HASH"; ranks that hold the same PART give the same HASH.
    """
    total = torch.zeros((), dtype=torch.int64)
    part, parts = 0, 1
    for name, parameter in module.named_parameters():
        total += _hash(name, *shard(parameter)).cpu()
        if is_partitioned(parameter):
            part = torch.distributed.get_rank(parameter.ds_process_group)
            parts = torch.distributed.get_world_size(parameter.ds_process_group)
            if parameter.ds_persist and parameter.numel() == parameter.ds_numel:
                now = _hash(name, parameter.data.view(-1), 0).cpu()
                total += now - whole.setdefault(name, now)
    for name, buffer in module.named_buffers():
        flat = buffer.reshape(-1)
        if not flat.is_floating_point():
            flat = flat.contiguous().view(torch.uint8)
        total += _hash(name, flat, 0).cpu()
    return f"{part + 1}/{parts} {_digits(total)}"


def _digits(total: Tensor) -> str:
    return f"{total.item() & 0xFFFFFFFFFFFFFFFF:016x}"


def _hash(name: str, elements: Tensor, offset: int) -> Tensor:
    """Returns an int64 hash of the flat elements of the tensor `name` from position `offset` on."""
    total = torch.zeros((), dtype=torch.int64, device=elements.device)
    salt = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
    chunk = _CHUNK_ON_CPU if elements.device.type == "cpu" else _CHUNK
    for start in range(0, elements.numel(), chunk):
        bits = elements[start : start + chunk].contiguous().view(_BITS[elements.dtype]).long()
        position = torch.arange(bits.numel(), device=elements.device) + (offset + start)
        # Knuth's golden-ratio multiplier as a signed 64-bit integer; int64 products wrap.
        mixed = (position + salt) * -7046029254386353131
        mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
        total += ((bits + 1) * (mixed | 1)).sum()
    return total
