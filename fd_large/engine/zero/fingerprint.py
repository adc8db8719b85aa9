"""64-bit hashes of the weights that a module, or one rank of it, holds."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import Tensor, nn

from fd_large import distributed
from fd_large.engine.zero.partition import is_partitioned, piece


def fingerprint(module: nn.Module, *, group: Any = None) -> str:
    """A 64-bit hash of all parameters and buffers, the same however they are split.

    Sum over elements of (bits + 1) * odd(position, name) modulo 2^64: linear, so that each rank
    hashes what it holds and one all-reduce adds the parts up; any single changed element changes
    the sum. Not cryptographic.

    Args:
        module: Whole or partitioned parameters.
        group: The ranks that share them; None for all.
    """
    total = torch.zeros((), dtype=torch.int64)
    partitioned = False
    for name, parameter in module.named_parameters():
        held, offset = piece(parameter)
        partitioned |= is_partitioned(parameter)
        total += _hash_piece(name, held, offset).cpu()
    if partitioned:
        total = distributed.sum_tensor(total, group=group)
    for name, buffer in module.named_buffers():  # Whole on every rank: once, after the sum.
        if buffer.is_floating_point():
            total += _hash_piece(name, buffer.view(-1), 0).cpu()
    return f"{total.item() & 0xFFFFFFFFFFFFFFFF:016x}"


def held_fingerprint(module: nn.Module, whole: dict[str, Tensor]) -> str:
    """Returns "PART/PARTS HASH" of what this rank itself holds of a module, no other rank asked.

    Its pieces, all buffers, and what ZeRO-3 keeps whole beside the pieces. Ranks that hold the same
    part give the same.

    Args:
        module: Whole or partitioned parameters.
        whole: Hashes of tensors that are kept whole, as first seen, by name; extended. DeepSpeed
            fetches them at a forward of its choice, so they count by what changed since.
    """
    total = torch.zeros((), dtype=torch.int64)
    part, parts = 0, 1
    for name, parameter in module.named_parameters():
        total += _hash_piece(name, *piece(parameter)).cpu()
        if is_partitioned(parameter):
            part = torch.distributed.get_rank(parameter.ds_process_group)
            parts = torch.distributed.get_world_size(parameter.ds_process_group)
            if parameter.ds_persist and parameter.numel() == parameter.ds_numel:
                now = _hash_piece(name, parameter.data.view(-1), 0).cpu()
                total += now - whole.setdefault(name, now)
    for name, buffer in module.named_buffers():
        flat = buffer.reshape(-1)
        total += _hash_piece(name, flat if flat.is_floating_point() else _bytes(flat), 0).cpu()
    return f"{part + 1}/{parts} {total.item() & 0xFFFFFFFFFFFFFFFF:016x}"


def _bytes(flat: Tensor) -> Tensor:
    return flat.contiguous().view(torch.uint8)


_BITS = {
    torch.float32: torch.int32,
    torch.bfloat16: torch.int16,
    torch.float16: torch.int16,
    torch.uint8: torch.uint8,
}


_CHUNK = 1 << 22  # Elements hashed at once: 32 MiB of int64 beside the parameter.


def _hash_piece(name: str, held: Tensor, offset: int) -> Tensor:
    total = torch.zeros((), dtype=torch.int64, device=held.device)
    salt = int.from_bytes(hashlib.blake2b(name.encode(), digest_size=7).digest(), "big")
    for start in range(0, held.numel(), _CHUNK):
        bits = held[start : start + _CHUNK].contiguous().view(_BITS[held.dtype]).long()
        position = torch.arange(bits.numel(), device=held.device) + (offset + start)
        # Knuth's golden-ratio multiplier as a signed 64-bit integer; int64 products wrap.
        mixed = (position + salt) * -7046029254386353131
        mixed = (mixed ^ (mixed >> 29)) * -4658895280553007687
        total += ((bits + 1) * (mixed | 1)).sum()
    return total
