"""How long a step takes: computation, communication, optimizer.

Computation of a micro-batch, where the phases of a real step were measured (`plan.phases`), is
their seconds, and what ZeRO adds: passes over gradients and gathered parameters, hooks. Else:

- matrix products: each takes the longer of FLOPs / product rate and bytes / bandwidth;
- the rest: bytes moved / bandwidth, with the gradients of the parameters and the copies of gathered
  parameters;
- starting the operations from Python, and DeepSpeed's hooks around each module at stage 3. Python
  runs ahead of a GPU, so this counts only if it takes longer than all the rest; on CPU ranks it is
  added.

Communication of a micro-batch, where S and T are one gather or scatter of student and teacher
(`plan.cluster`):

| ZeRO | student, each micro-batch            | student, each step           |
|------|--------------------------------------|------------------------------|
| 0    | none                                 | gradients 2 S                |
| 1    | none                                 | gradients 2 S, parameters S  |
| 2    | gradients 2 S                        | parameters S                 |
| 3    | S forward, R backward, gradients S   | none                         |

Parameters travel in their data type, and gradients in that of their sums, which is float32 over
more than `MOST_BFLOAT16_SUMMANDS` ranks. At stages 0 to 2 their sums go to all ranks, a scatter and
a gather; on up to `MOST_OWNERS` ranks, at stages 1 and 2, each goes to the rank that steps its
parameter alone, and takes S (engine/zero/gradient_reduction.py). R is S without what is still whole
when the backward pass begins: layers that are used again within `stage3_max_reuse_distance`
elements, forward and back, stay whole.

A split teacher adds T per micro-batch, over all ranks or inside each node. With hpZ the backward
pass gathers inside a node. On GPUs communication runs beside computation, and the longer of the two
counts; CPU ranks, whose cores do both, take the sum. After the last micro-batch come the
collectives of the step and the optimiser, which moves 46 bytes (bfloat16) for each parameter of the
rank's shard.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fd_large.plan.buckets import MOST_OWNERS, gradient_bucket
from fd_large.plan.candidate import Candidate
from fd_large.plan.cluster import Machine
from fd_large.plan.counts import Counts, StepFlops
from fd_large.plan.peak_memory import PeakMemory, peak_memory
from fd_large.plan.rates import Rates
from fd_large.plan.workload import Workload

# What a step computes: names for tables.
PRODUCTS, REST, ADDED = "matrix products", "the rest", "ZeRO's copies and hooks"
# Bytes that a step moves per parameter of the rank's shard, in float32: 4 for the norm, 8 for
# clipping, 12 for the optimiser (reads gradient and master, writes the master). Each moment is read
# and written.
OPTIMIZER_BYTES, MOMENT_BYTES = 24, 8
# A parameter's gradient is written, copied into a bucket (read, written), and added to the
# accumulated one (read), half in the data type of the parameters, half in that of the sums.
GRADIENT_PASSES = 4
# DeepSpeed's hooks at stage 3 run before and after each module, and take as long as HOOK_CALLS
# calls (measured with 0.19.8 on an idle CPU rank: 0.24 ms per module and pass, 9 us per call).
HOOK_CALLS = 27
# Half of DeepSpeed's `stage3_max_reuse_distance`, which counts forward and back.
KEPT_ELEMENTS = 500_000_000


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """Seconds of a step.

    Attributes:
        parts: Computation of a micro-batch, by what it is: phases where they were measured, else
            `PRODUCTS` and `REST`.
        communication: Communication of a micro-batch.
        finish: Collectives and optimizer after the last micro-batch.
        accumulation: Number of micro-batches.
        overlap: Whether communication runs beside computation.
    """

    parts: Mapping[str, float]
    communication: float
    finish: float
    accumulation: int
    overlap: bool

    @property
    def computation(self) -> float:
        """Computation of a micro-batch."""
        return sum(self.parts.values())

    @property
    def total(self) -> float:
        """The whole step."""
        both = self.computation, self.communication
        return self.accumulation * (max(both) if self.overlap else sum(both)) + self.finish


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A candidate with its figures.

    Attributes:
        candidate: What was chosen.
        memory: Peak memory of a rank.
        seconds: Seconds of a step.
        flops: FLOPs of a micro-batch.
        images: Images of a step, over all ranks.
        peak: Peak FLOP/s of a card.
    """

    candidate: Candidate
    memory: PeakMemory
    seconds: StepSeconds
    flops: StepFlops
    images: int
    peak: float

    @property
    def images_per_second(self) -> float:
        """Images per second of the whole cluster."""
        return self.images / self.seconds.total

    @property
    def mfu(self) -> float:
        """Model FLOPs over the peak."""
        return self._share(self.flops.model)

    @property
    def hardware_utilisation(self) -> float:
        """FLOPs with recomputation over the peak."""
        return self._share(self.flops.hardware)

    def _share(self, count: int) -> float:
        return count * self.seconds.accumulation / self.seconds.total / self.peak


def estimate(load: Workload, candidate: Candidate, machine: Machine) -> Estimate:
    """Returns memory and time of a candidate; the memory may be more than the card has."""
    return Estimate(
        candidate=candidate,
        memory=peak_memory(load, candidate, machine),
        seconds=StepSeconds(
            parts=_computation(load, candidate, machine),
            communication=_communication(load, candidate, machine),
            finish=_finish(load, candidate, machine),
            accumulation=load.accumulation(candidate, machine),
            overlap=machine.rates.overlap,
        ),
        flops=load.counts_of(candidate, machine).step_flops(candidate.micro_batch_size),
        images=load.global_batch_size,
        peak=machine.rates.peak,
    )


def _computation(load: Workload, candidate: Candidate, machine: Machine) -> dict[str, float]:
    rates, images = machine.rates, candidate.micro_batch_size
    counts = load.counts_of(candidate, machine)
    calls, hooks = sum(counts.calls.values()), HOOK_CALLS * _hooked(load, candidate, counts)
    added = _added_bytes(load, candidate, machine) / rates.bandwidth
    if load.phases:
        first_pass = bool(counts.modules.get("first_pass"))
        again = _computed_again(load, candidate)
        parts = load.phases.at(images, first_pass=first_pass, again=again)
        # What is timed has its own calls of Python.
        starting = hooks * rates.launch_seconds
        if rates.overlap:
            starting = max(0.0, (calls + hooks) * rates.launch_seconds - sum(parts.values()))
            return parts | {ADDED: max(added, starting)}
        return parts | {ADDED: added + starting}
    matrix, other = seconds_of(counts, images, rates)
    other += load.compute_bytes(machine) * load.parameters / rates.bandwidth + added
    starting = (calls + hooks) * rates.launch_seconds
    if not rates.overlap:
        return {PRODUCTS: matrix, REST: other + starting}
    return {PRODUCTS: matrix, REST: max(other, starting - matrix)}


def _added_bytes(load: Workload, candidate: Candidate, machine: Machine) -> float:
    """Returns the bytes of passes over parameters and gradients that a step alone does not make."""
    size, moved = load.compute_bytes(machine), 0.0
    if candidate.stage or machine.cluster.gpus > 1:
        # Backward itself writes each gradient once.
        moved += GRADIENT_PASSES * (size + load.sum_bytes(machine)) / 2 - size
    if candidate.stage == 3:  # What is gathered, forward and backward, is copied in place.
        moved += 2 * (1 + _gathered_again(load)) * size
    moved *= load.parameters
    own = 2 if load.teacher_bfloat16(machine) else 4
    return moved + 2 * own * sum(load.split_sizes(candidate))


def _computed_again(load: Workload, candidate: Candidate) -> float:
    """Returns the FLOPs that activation checkpointing computes again, as a fraction of forward."""
    if not candidate.checkpointing:
        return 0.0
    images = candidate.micro_batch_size
    without, with_them = (load.counts[c].step_flops(images).hardware for c in (False, True))
    return (with_them - without) / load.counts[False].flops("forward", images)


def seconds_of(counts: Counts, images: int, rates: Rates) -> tuple[float, float]:
    """Returns the seconds of a micro-batch's matrix products, and of the rest without its starts.

    Args:
        counts: What it computes and moves.
        images: Images of the micro-batch.
        rates: Those of the card.
    """
    matrix = sum(
        product.times
        * max(product.flops.at(images) / rates.matmul, product.moved.at(images) / rates.bandwidth)
        for product in counts.products
    )
    return matrix, sum(line.at(images) for line in counts.moved.values()) / rates.bandwidth


def _hooked(load: Workload, candidate: Candidate, counts: Counts) -> float:
    """Returns the forwards and backwards of modules around which DeepSpeed's hooks run."""
    modules, hooked = counts.modules, 0.0
    if candidate.stage == 3:  # Forward, backward, what backward computes again, a first pass.
        hooked += 2 * modules.get("forward", 0)
        hooked += modules.get("backward", 0) + modules.get("first_pass", 0)
    if split := load.split_sizes(candidate):
        # A teacher's share of the modules is taken to be that of the tensors.
        hooked += modules.get("inference", 0) * len(split) / len(load.teacher_sizes)
    return hooked


def _communication(load: Workload, candidate: Candidate, machine: Machine) -> float:
    cluster, rates = machine.cluster, machine.rates
    whole = load.compute_bytes(machine) * load.parameters
    calls = sum(1 for n in load.student_sizes if n > load.threshold)
    gradients, buckets = load.sum_bytes(machine) * load.parameters, _buckets(load)
    total = 0.0
    if candidate.stage == 3:
        again, span = _gathered_again(load), "node" if candidate.hpz else "all"
        total += cluster.seconds(whole, rates, calls=calls)
        if load.counts_of(candidate, machine).modules.get("first_pass"):
            total += cluster.seconds(whole, rates, calls=calls)
        total += again * cluster.seconds(whole, rates, span=span, calls=calls)
        total += cluster.seconds(gradients, rates, calls=buckets)
    elif candidate.stage == 2:
        total += _scatters(candidate, machine) * cluster.seconds(gradients, rates, calls=buckets)
    if split := load.split_sizes(candidate):
        size = 2 if load.teacher_bfloat16(machine) else 4
        calls = sum(1 for n in split if n > load.threshold)
        span = "node" if candidate.teacher == "node" else "all"
        total += cluster.seconds(size * sum(split), rates, span=span, calls=calls)
    return total


def _scatters(candidate: Candidate, machine: Machine) -> int:
    """Returns how many scatters a sum of the gradients at stages 0 to 2 takes as long as."""
    return 1 if candidate.stage and machine.cluster.gpus <= MOST_OWNERS else 2


def _gathered_again(load: Workload) -> float:
    """Returns the fraction of parameters that ZeRO-3 gathers again for the backward pass."""
    return max(0.0, 1 - KEPT_ELEMENTS / load.parameters)


def _buckets(load: Workload) -> int:
    return -(-load.parameters // gradient_bucket(load.parameters))


def _finish(load: Workload, candidate: Candidate, machine: Machine) -> float:
    cluster, rates = machine.cluster, machine.rates
    # Stage 0 steps the parameters themselves, without a copy.
    split = 1 if candidate.stage == 0 else cluster.gpus
    # Each master is read, and the new parameter is written.
    copied = 4 + load.compute_bytes(machine) if candidate.stage else 0
    if load.phases:
        update = load.phases.update + copied / rates.bandwidth
    else:
        update = (OPTIMIZER_BYTES + MOMENT_BYTES * load.moments + copied) / rates.bandwidth
    total = update * load.parameters / split
    whole = load.compute_bytes(machine) * load.parameters
    if candidate.stage in (1, 2):
        total += cluster.seconds(whole, rates)
    if candidate.stage <= 1:
        gradients = load.sum_bytes(machine) * load.parameters
        total += _scatters(candidate, machine) * cluster.seconds(
            gradients, rates, calls=_buckets(load)
        )
    return total
