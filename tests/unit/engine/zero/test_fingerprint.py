"""A hash that any changed element changes, the same whole and in shards."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from fd_large.engine.zero import partition
from fd_large.engine.zero.fingerprint import fingerprint

CONFIG = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


def build(*, partitioned, seed=0):
    return partition.build(lambda: nn.Linear(7, 5), CONFIG, partitioned=partitioned, seed=seed)


@pytest.mark.parametrize("bfloat16", [False, True])
def test_whole_and_sharded_have_one_hash(one_rank, bfloat16):
    whole, sharded, other = (
        build(partitioned=False),
        build(partitioned=True),
        build(partitioned=True, seed=1),
    )
    for module in (whole, sharded, other) if bfloat16 else ():
        partition.to_bfloat16(module)
    assert fingerprint(whole) == fingerprint(sharded) != fingerprint(other)
    held, _ = partition.shard(sharded.weight)
    held[-1] += 0.5
    assert fingerprint(sharded) != fingerprint(whole)


def test_places_and_names_count():
    one, two = nn.Linear(2, 2, bias=False), nn.Linear(2, 2, bias=False)
    with torch.no_grad():
        two.weight.copy_(one.weight.flip(0))
    assert fingerprint(one) != fingerprint(two)
    assert fingerprint(nn.ModuleDict({"a": one})) != fingerprint(nn.ModuleDict({"b": one}))
