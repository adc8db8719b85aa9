"""A module has the same values whole and in shards, takes weights, and keeps exact masters."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack
from whole_weights import whole_weights

from fd_large.backbones.initialization import HostDraws
from fd_large.engine.zero import partition
from fd_large.engine.zero.disk import Disk
from fd_large.errors import WeightsError

CONFIG = {"train_micro_batch_size_per_gpu": 1, "zero_optimization": {"stage": 3}}


class Normed(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 5)
        self.norm = nn.BatchNorm1d(5)
        self.register_buffer("index", torch.arange(4))


def build(*, partitioned, seed=0, **more):
    return partition.build(Normed, CONFIG, partitioned=partitioned, seed=seed, **more)


@pytest.fixture(autouse=True)
def ranks(one_rank):
    """DeepSpeed splits over a group, here of one rank."""


@pytest.mark.parametrize("whole_first", [False, True])
def test_shards_have_the_values_of_the_whole_and_the_callers_generator_stays(whole_first):
    state = torch.random.get_rng_state()
    whole = dict(build(partitioned=False).named_parameters())
    sharded = build(partitioned=True, whole_first=whole_first)
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(partition.is_partitioned(p) for p in sharded.parameters())
    for name, value in whole_weights(sharded):
        assert torch.equal(value, whole[name]), name
    for name, parameter in sharded.named_parameters():
        held, offset = partition.shard(parameter)
        assert offset == 0
        assert torch.equal(held, whole[name].data.view(-1))
    other = dict(build(partitioned=False, seed=1).named_parameters())
    assert not torch.equal(other["linear.weight"], whole["linear.weight"])


def test_what_is_drawn_on_a_device_while_a_module_is_split_comes_from_the_hosts_generator():
    modes = []

    def make():
        modes.extend(map(type, _get_current_dispatch_mode_stack()))
        return Normed()

    partition.build(make, CONFIG, partitioned=True, seed=0)
    assert modes == [HostDraws]


def test_a_shard_ends_where_the_parameter_does(monkeypatch):
    parameter = next(build(partitioned=True).parameters())
    parameter.ds_tensor.data = torch.arange(8.0)  # A shard of 15 elements on two ranks.
    for rank, length, offset in ((0, 8, 0), (1, 7, 8), (2, 0, 15)):
        monkeypatch.setattr(torch.distributed, "get_rank", lambda group, rank=rank: rank)
        held, start = partition.shard(parameter)
        assert (held.numel(), start) == (length, offset)


@pytest.mark.parametrize("partitioned", [False, True])
def test_weights_and_running_statistics_are_loaded(partitioned):
    source = build(partitioned=False, seed=1)
    source.norm.running_mean.fill_(3.0)
    state = {n: t for n, t in source.state_dict().items() if t.is_floating_point()}
    module = build(partitioned=partitioned)
    partition.load_weights(module, state.items(), where="--student.init")
    for name, value in whole_weights(module):
        assert torch.equal(value, state[name]), name
    assert module.norm.running_mean.eq(3).all()
    del state["linear.bias"]
    with pytest.raises(WeightsError, match=r"--student\.init.*linear\.bias"):
        partition.load_weights(module, state.items(), where="--student.init")


@pytest.mark.parametrize("whole_first", [False, True])
def test_shards_on_a_disk_have_the_same_values(whole_first, tmp_path):
    expected = dict(build(partitioned=False).named_parameters())
    module = build(partitioned=True, whole_first=whole_first, disk=Disk(str(tmp_path)))
    assert Path("/proc/self/maps").read_text().count(f" {tmp_path}/") == len(expected)
    for name, value in whole_weights(module):
        assert torch.equal(value, expected[name]), name


@pytest.mark.parametrize("partitioned", [False, True])
def test_bfloat16_leaves_the_exact_values_in_the_callers_hands(partitioned):
    module = build(partitioned=partitioned)
    before = {name: value.clone() for name, value in whole_weights(module)}
    exact = partition.to_bfloat16(module, keep_exact=True)
    for name, value in whole_weights(module):
        assert value.dtype == torch.bfloat16
        assert torch.equal(value, before[name].bfloat16())
        assert torch.equal(exact[name], before[name].view(-1))
