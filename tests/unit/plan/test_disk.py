"""State on a disk: what leaves the memory is on the disk, and is moved twice in a step."""

from __future__ import annotations

import pytest

from fd_large.cli.plan import workload
from fd_large.plan.candidate import Candidate
from fd_large.plan.cluster import Cluster, Machine
from fd_large.plan.disk import on_disk
from fd_large.plan.peak_memory import peak_memory
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
    # Fewer gathered layers live, too: 9e8 elements of bfloat16.
    assert in_memory - plain.memory == pytest.approx(plain.disk / ranks + 1.8e9, rel=1e-3)
