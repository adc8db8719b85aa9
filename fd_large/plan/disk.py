"""Disk, memory and time of a run whose optimiser's state is on a disk (zero3_nvme.json)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fd_large.plan.buckets import MOST_ELEMENTS
from fd_large.plan.candidate import Candidate
from fd_large.plan.cluster import Machine
from fd_large.plan.memory import held
from fd_large.plan.peak_memory import LIVE_ELEMENTS, peak_memory, placement_of
from fd_large.plan.workload import Workload

# As in zero3_nvme.json: gathered layers are freed above `stage3_max_live_parameters`, and the
# engine owns a bucket of `reduce_bucket_size`.
FEW_LIVE_ELEMENTS, BUCKET_ELEMENTS = 100_000_000, MOST_ELEMENTS


@dataclass(frozen=True, kw_only=True)
class OnDisk:
    """ZeRO-3 with every block checkpointed and one image at a time, its state on a disk.

    Attributes:
        memory: Peak bytes of a rank.
        disk: Bytes of a node's ranks on the node's disk.
        seconds: What moving the state adds to a step if none of it stays in memory.
    """

    memory: float
    disk: float
    seconds: float


def on_disk(load: Workload, machine: Machine, *, speed: float, average: bool = False) -> OnDisk:
    """Returns what such a run takes.

    Args:
        load: The work.
        machine: Ranks and nodes; memory as that of one kind.
        speed: Bytes a second of each node's disk, read or written.
        average: Whether an average of the weights is kept.
    """
    candidate = Candidate(stage=3, checkpointing=True, micro_batch_size=1)
    place = replace(placement_of(load, candidate, machine), bucket_size=BUCKET_ELEMENTS)
    sizes = load.student_sizes
    in_memory = held(sizes, (), place, moments=load.moments).device
    disk = replace(place, offload_optimizer=True, optimizer_on_disk=True)
    moved = held(sizes, (), disk, moments=load.moments + average).disk.total
    live = min(LIVE_ELEMENTS, load.parameters) - min(FEW_LIVE_ELEMENTS, load.parameters)
    memory = peak_memory(load, candidate, machine).total
    memory -= in_memory.masters + in_memory.moments + in_memory.gradients
    memory += in_memory.buckets - load.compute_bytes(machine) * live
    of_node = moved * machine.cluster.node_size
    # Gradients are written and read; masters, moments and the average read and written.
    return OnDisk(memory=memory, disk=of_node, seconds=2 * of_node / speed)
