"""State on a disk: what leaves the memory is on the disk, and is moved twice in a step."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fd_large.cli.plan_workload import workload
from fd_large.plan.candidate import Candidate
from fd_large.plan.cluster import Cluster, Machine
from fd_large.plan.peak_memory import BUCKET_ELEMENTS, FEW_LIVE_ELEMENTS, on_disk, peak_memory
from fd_large.plan.rates import CARDS
from fd_large.recipes import registry


@pytest.mark.parametrize("ranks", [1, 4])
def test_what_leaves_the_memory_is_on_the_disk(ranks):
    load = workload(registry.get("fd_swinv2g"))
    cluster = Cluster(gpus=ranks, gpus_per_node=ranks, nic_gigabits=400, nics_per_node=1)
    machine = Machine(cluster=cluster, rates=CARDS["h100"])
    plain, averaged = (on_disk(load, machine, speed=1e9, average=on) for on in (False, True))
    assert plain.disk == pytest.approx(16 * load.parameters, rel=1e-3)
    assert averaged.disk == pytest.approx(20 * load.parameters, rel=1e-3)
    assert plain.seconds == pytest.approx(2 * plain.disk / 1e9)
    assert averaged.memory == plain.memory
    candidate = Candidate(stage=3, checkpointing=True, micro_batch_size=1)
    in_memory = peak_memory(load, candidate, machine).total
    # Fewer gathered layers live, too, 9e8 elements of bfloat16, but a bucket of 1e8 stays.
    spared = in_memory - plain.memory
    assert spared == pytest.approx(plain.disk / ranks + 1.8e9 - 0.2e9, rel=1e-3)


def test_the_configuration_has_the_numbers_that_are_planned():
    zero = json.loads(Path("ds_configs/zero3_nvme.json").read_text())["zero_optimization"]
    assert zero["stage3_max_live_parameters"] == FEW_LIVE_ELEMENTS
    assert zero["reduce_bucket_size"] == BUCKET_ELEMENTS
    assert "contiguous_gradients" not in zero, "the bucket is there by default"
