"""Computes the peak memory of a rank, which is reached in a step.

The peak is the memory that `plan.memory` computes between steps, and what a step needs in addition.
This module also computes the costs of a run with the optimiser's state on a disk
(ds_configs/zero3_nvme.json).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from fd_large.plan.buckets import MOST_ELEMENTS, gradient_bucket
from fd_large.plan.candidate import Candidate
from fd_large.plan.cluster import Machine
from fd_large.plan.memory import Placement, held
from fd_large.plan.rates import Rates
from fd_large.plan.workload import Workload

# DeepSpeed's `stage3_max_live_parameters`: gathered layers are freed above this many elements.
LIVE_ELEMENTS = 1_000_000_000
# Driver, libraries and their buffers on a GPU; assumed.
FIXED_BYTES = 2e9
# Fraction of the memory that a plan, or the engine's search for a micro-batch, may fill: allocators
# fragment, and loaders grow.
HEADROOM = 0.92
# As in zero3_nvme.json: gathered layers are freed above `stage3_max_live_parameters`, and the
# engine owns a bucket of `reduce_bucket_size`.
FEW_LIVE_ELEMENTS, BUCKET_ELEMENTS = 100_000_000, MOST_ELEMENTS


@dataclass(frozen=True, kw_only=True)
class PeakMemory:
    """Bytes on a rank's device at the peak of memory.

    Attributes:
        states: Bytes of parameters, master weights, moments, accumulated gradients, and hpZ's copy
            of the parameters.
        teacher: Bytes of the rank's part of the teachers.
        activations: Bytes of the tensors that forward stores for backward, and of intermediate
            results of backward. In a step in two passes, the stored tensors of the other
            micro-batches are included.
        buffers: Bytes of gathered layers, buckets, gradients before their reduction, and the GPU
            driver.
    """

    states: float
    teacher: float
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        """Sum of all attributes, in bytes."""
        return self.states + self.teacher + self.activations + self.buffers

    def fits(self, rates: Rates) -> bool:
        """Whether the total is at most the fraction `HEADROOM` of `rates.memory_bytes`."""
        return self.total <= HEADROOM * rates.memory_bytes


def peak_memory(load: Workload, candidate: Candidate, machine: Machine) -> PeakMemory:
    """Returns the peak memory of a rank in a run.

    Args:
        load: The training run.
        candidate: The settings of the run.
        machine: The hardware.
    """
    cluster, rates = machine.cluster, machine.rates
    size, counts = load.compute_bytes(machine), load.counts_of(candidate, machine)
    bucket = load.sum_bytes(machine) * gradient_bucket(load.parameters)
    split, accumulation = load.split_sizes(candidate), load.accumulation(candidate, machine)
    memory = held(
        load.student_sizes,
        split,
        placement_of(load, candidate, machine),
        moments=load.moments,
    )
    device = memory.device
    states: float = device.total - device.teacher - device.buckets
    passing: float  # What the student's forward and backward pass through.
    if candidate.stage == 3:
        states += memory.hpz_copy
        passing = size * min(load.parameters, LIVE_ELEMENTS)
        # Gradients being reduced, and the next ones: no more than there are.
        passing += min(2 * bucket, load.sum_bytes(machine) * load.parameters)
    elif candidate.stage == 2 or (
        candidate.stage == 1 and not rates.bfloat16 and accumulation == 1
    ):
        passing = size * gradient_bucket(load.parameters)  # Until their bucket is complete.
    elif candidate.stage == 1 and rates.bfloat16:
        # Each gradient is added to its float32 sum at once; sums are sent bucket by bucket, in
        # bfloat16 as copies, two at a time.
        copies = 2 if cluster.gpus > 1 and load.sum_bytes(machine) == 2 else 0
        passing = size * max(load.student_sizes) + copies * bucket
    elif candidate.stage == 0 and cluster.gpus > 1:
        passing = size * max(load.student_sizes)  # On its way into a bucket that is there.
    else:
        passing = size * load.parameters  # All gradients are there at once.
    element_bytes = 2 if load.teacher_bfloat16(machine) else 4
    if split and cluster.gpus > 1:
        # Gathered layers of one teacher at a time, which are gone when the student runs.
        largest = max(map(sum, load.teachers))
        passing = max(passing, element_bytes * min(LIVE_ELEMENTS, largest))
    return PeakMemory(
        states=states,
        teacher=device.teacher + element_bytes * (sum(load.teacher_sizes) - sum(split)),
        activations=counts.peak_at(candidate.micro_batch_size)
        + (accumulation - 1) * counts.held.at(candidate.micro_batch_size),
        buffers=device.buckets + passing + (FIXED_BYTES if rates.overlap else 0.0),
    )


def placement_of(load: Workload, candidate: Candidate, machine: Machine) -> Placement:
    """Returns the settings that determine where the state of a run is kept.

    Args:
        load: The training run.
        candidate: The settings of the run.
        machine: The hardware.
    """
    cluster = machine.cluster
    return Placement(
        stage=candidate.stage,
        world_size=cluster.gpus,
        node_size=cluster.node_size,
        bfloat16=machine.rates.bfloat16,
        teacher_bfloat16=load.teacher_bfloat16(machine),
        teacher_placement=candidate.teacher,
        persistence_threshold=load.threshold,
        teacher_persistence_threshold=load.threshold,
        hpz_size=cluster.node_size if candidate.hpz else 1,
        # The buckets are those of ds_configs/; stage 3 keeps none.
        bucket_size=0 if candidate.stage == 3 else gradient_bucket(load.parameters),
        float32_sums=load.sum_bytes(machine) == 4,
    )


@dataclass(frozen=True, kw_only=True)
class OnDisk:
    """Costs of a run at ZeRO-3 with the optimiser's state on a disk.

    Activation checkpointing is on, and a micro-batch has one image.

    Attributes:
        memory: Peak memory of a rank, in bytes.
        disk: Bytes that all ranks of a node have on the node's disk.
        seconds: Seconds that reading and writing the state adds to a step, if no pages of the files
            stay cached in memory.
    """

    memory: float
    disk: float
    seconds: float


def on_disk(load: Workload, machine: Machine, *, speed: float, average: bool = False) -> OnDisk:
    """Returns the costs of a run with the optimiser's state on a disk.

    The costs are a rank's peak memory, the disk space on a node, and the seconds added to each
    step.

    Args:
        load: The workload.
        machine: The hardware.
        speed: Rate in bytes/s at which each node's disk is read or written.
        average: Whether the run keeps a moving average of the weights.
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
