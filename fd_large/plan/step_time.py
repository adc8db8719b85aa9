"""Computes the seconds of a step, with four constants that were checked against measurements.

    step = micro-batches x max(products + bytes + hooks, communication) + finish

- products: Each matrix product takes the longer of FLOPs / product rate and bytes / bandwidth.
- bytes: All other operations, also on gradients and on copies of gathered parameters, take their
  bytes / bandwidth. If Python needs longer to start the operations, the time of Python counts.
- hooks: DeepSpeed's hooks run around each module whose parameters are gathered, or around each
  block that fd_large gathers at once. Their time is added, because measured steps at stage 3 are
  longer by this time whatever their products are.
- communication: On GPUs, collectives run at the same time as computation. On CPU ranks, whose cores
  do both, the sum of both times counts instead of the maximum.
- finish: After the last micro-batch come the collectives of the step and the optimiser, which moves
  46 bytes (with bfloat16 and AdamW) for each parameter of the rank's shard.

If the phases of a real step were measured (`plan.phases`), their seconds replace products and
bytes, and ZeRO's costs are added.

Three of the constants are fractions of the single operations' rates in `plan.rates` that whole
steps on GPUs reach (of the data sheets' rates they are 0.73, 0.45 and 0.51). These three constants
are least-squares fits to 17 measurements of other software in benchmarks/public_rates.json; the
function `fitted` in tests/unit/plan/test_step_time.py repeats the fits. All measurements ran
PyTorch's own kernels, and none a fused kernel. The fourth constant is the cost of hooks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from fd_large.plan.candidate import Candidate
from fd_large.plan.cluster import Machine
from fd_large.plan.communication import gathered_again, of_micro_batch, of_step
from fd_large.plan.counts import Counts, StepFlops
from fd_large.plan.peak_memory import PeakMemory, peak_memory
from fd_large.plan.rates import Rates
from fd_large.plan.workload import Workload

# Matrix products: 9 rows on A100 and RTX 3090, 8 on H100 and H200. Of other generations there is no
# clean row; they are taken for the nearer one.
AMPERE_PRODUCTS = 0.90
HOPPER_PRODUCTS = 0.55
# All other operations: all rows, of which the three of Swin models tell it from the products.
BYTES = 0.57
# DeepSpeed's hooks before and after a module, in calls of Python: 0.24 ms a pass where a call took
# 9 us, measured with 0.19.8 on an idle CPU rank. 135 us at the 5 us of a GPU's host. Not fitted:
# the two rows with ZeRO-3 (68 and 212 us) lie on both sides of it.
HOOK_CALLS = 27
# A block that stage 3 gathers at once has one set of hooks for all its parameters. By the calls of
# Python that benchmarks/host_calls.py counts of it above DDP, over what DeepSpeed's own way took
# for each of the 9 and 13 modules of a block, it costs as 2.5 of them (ViT-L) and 1.9 (SwinV2-G),
# if frozen 1.8 and 1.4. So 0.28 and 0.29 of the calls of a block are left (with checkpoints 0.22
# and 0.24); of the processor time, on a busy machine, 0.30 and 0.45 to 0.52. Other modules are
# planned with all of the cost, although 0.67 of their calls are left.
WHOLE_BLOCK = 2.5
HOPPER = 9  # Compute capability.


class Between(NamedTuple):
    """A range of numbers.

    Attributes:
        low: Lower end.
        high: Upper end.
    """

    low: float
    high: float

    def scaled(self, factor: float) -> Between:
        """Returns the range whose ends are those of this range multiplied by `factor`."""
        return Between(factor * self.low, factor * self.high)


# Measured steps over the model's, of the rows without hooks. Software decides it: the same model on
# the same cards took 1.7 and 2.3 times as long in other runs. Then hooks alone, of the two rows
# that have them: 68 and 212 us over 135.
WITHOUT_HOOKS, OF_HOOKS = Between(0.8, 1.25), Between(0.5, 1.6)
# What a step computes: names for tables.
PRODUCTS, REST, HOOKS, ADDED = "matrix products", "the rest", "ZeRO-3's hooks", "ZeRO's copies"
# Bytes that a step moves per parameter of the rank's shard, in float32: 4 for the norm, 8 for
# clipping, 12 for the optimiser (reads gradient and master, writes the master). Each moment is read
# and written.
OPTIMIZER_BYTES, MOMENT_BYTES = 24, 8
# A parameter's gradient is written, copied into a bucket (read, written), and added to the
# accumulated one (read), half in the data type of the parameters, half in that of the sums.
GRADIENT_PASSES = 4


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """Seconds of a step and of its parts.

    Attributes:
        parts: {part: seconds of computation in a micro-batch}. If the phases of a step were
            measured, the parts are these phases and `ADDED` (ZeRO's copies, and waits for Python
            to start operations). Otherwise the parts are `PRODUCTS` (matrix products) and `REST`
            (everything else). In both cases there is the part `HOOKS` if DeepSpeed's hooks run.
        communication: Seconds of communication in a micro-batch.
        finish: Seconds of collectives and optimiser after the last micro-batch.
        accumulation: Number of micro-batches of a rank in a step.
        overlap: Whether communication runs at the same time as computation.
    """

    parts: Mapping[str, float]
    communication: float
    finish: float
    accumulation: int
    overlap: bool

    @property
    def computation(self) -> float:
        """Seconds of computation in a micro-batch."""
        return sum(self.parts.values())

    @property
    def total(self) -> float:
        """Seconds of the whole step."""
        return self._step(1, 1)

    @property
    def between(self) -> Between:
        """Range in which the seconds of the whole step are expected."""
        low, high = zip(WITHOUT_HOOKS, OF_HOOKS, strict=True)
        return Between(self._step(*low), self._step(*high))

    def _step(self, factor: float, of_hooks: float) -> float:
        """Returns the seconds of the step if its parts take longer or shorter than planned.

        Args:
            factor: Factor for the seconds of everything except hooks.
            of_hooks: Factor for the seconds of hooks.
        """
        hooks = self.parts.get(HOOKS, 0.0)
        computed = factor * (self.computation - hooks) + of_hooks * hooks
        both = computed, factor * self.communication
        in_all = max(both) if self.overlap else sum(both)
        return self.accumulation * in_all + factor * self.finish


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """Estimated memory and time of a candidate.

    Attributes:
        candidate: The candidate.
        memory: Peak memory of a rank.
        seconds: Seconds of a step and of its parts.
        flops: FLOPs of a micro-batch on one rank.
        images: Number of images in a step, over all ranks.
        peak: Peak FLOP/s of a GPU.
    """

    candidate: Candidate
    memory: PeakMemory
    seconds: StepSeconds
    flops: StepFlops
    images: int
    peak: float

    @property
    def images_per_second(self) -> float:
        """Images per second, over all ranks."""
        return self.images / self.seconds.total

    @property
    def mfu(self) -> float:
        """Required FLOPs per second of a rank, as a fraction of the peak."""
        return self._share(self.flops.model)

    @property
    def hardware_utilisation(self) -> float:
        """Executed FLOPs per second of a rank, with recomputation, as a fraction of the peak."""
        return self._share(self.flops.hardware)

    def _share(self, count: float) -> float:
        return count * self.seconds.accumulation / self.seconds.total / self.peak


def estimate(load: Workload, candidate: Candidate, machine: Machine) -> Estimate:
    """Estimates memory and time of a run, even if it does not fit into the GPU's memory.

    Args:
        load: The training run.
        candidate: The settings of the run.
        machine: The hardware.
    """
    return Estimate(
        candidate=candidate,
        memory=peak_memory(load, candidate, machine),
        seconds=StepSeconds(
            parts=_computation(load, candidate, machine),
            communication=of_micro_batch(load, candidate, machine),
            finish=_update(load, candidate, machine) + of_step(load, candidate, machine),
            accumulation=load.accumulation(candidate, machine),
            overlap=machine.rates.overlap,
        ),
        flops=load.counts_of(candidate, machine).step_flops(candidate.micro_batch_size),
        images=load.global_batch_size,
        peak=machine.rates.peak,
    )


def _computation(load: Workload, candidate: Candidate, machine: Machine) -> dict[str, float]:
    rates, images = machine.rates, candidate.micro_batch_size
    counts, (flops, bandwidth) = load.counts_of(candidate, machine), reached(rates)
    added = _added_bytes(load, candidate, machine) / bandwidth
    if load.phases:
        first_pass = bool(counts.modules.get("first_pass"))
        again = _computed_again(load, candidate)
        parts = load.phases.at(images, first_pass=first_pass, again=again)
        parts[ADDED] = added
    else:
        products = sum(
            product.times
            * max(product.flops.at(images) / flops, product.moved.at(images) / bandwidth)
            for product in counts.products
        )
        moved = sum(line.at(images) for line in counts.moved.values())
        moved += load.compute_bytes(machine) * load.parameters
        parts = {PRODUCTS: products, REST: moved / bandwidth + added}
    calls = sum(counts.calls.values()) * rates.launch_seconds
    if rates.overlap:  # Python runs ahead of a GPU, unless it needs longer.
        calls = max(0.0, calls - sum(parts.values()))
    elif load.phases:  # What is timed has its own calls of Python.
        calls = 0.0
    parts[ADDED if load.phases else REST] += calls
    if hooked := rates.hooked_share * _hooked(load, candidate, counts):
        parts[HOOKS] = HOOK_CALLS * rates.launch_seconds * hooked
    return parts


def reached(rates: Rates) -> tuple[float, float]:
    """Returns the rates that whole steps reach, as fractions of the single operations' rates.

    Args:
        rates: Rates of single operations. On a CPU they are returned unchanged.

    Returns: FLOP/s of matrix products; bytes/s of other operations.
    """
    if not rates.overlap:  # A CPU rank computes one operation after the other.
        return rates.matmul, rates.bandwidth
    generation = int(rates.capability.partition(".")[0] or HOPPER)
    share = HOPPER_PRODUCTS if generation >= HOPPER else AMPERE_PRODUCTS
    return share * rates.matmul, BYTES * rates.bandwidth


def _added_bytes(load: Workload, candidate: Candidate, machine: Machine) -> float:
    """Returns the bytes that a micro-batch moves in copies of gradients and gathered parameters.

    The gathered parameters are those of the student at stage 3, and of teachers that are sharded.

    Args:
        load: The training run.
        candidate: The settings of the run.
        machine: The hardware.
    """
    size, moved = load.compute_bytes(machine), 0.0
    if candidate.stage or machine.cluster.gpus > 1:
        # Backward itself writes each gradient once.
        moved += GRADIENT_PASSES * (size + load.sum_bytes(machine)) / 2 - size
    if candidate.stage == 3:  # What is gathered, forward and backward, is copied in place.
        moved += 2 * (1 + gathered_again(load)) * size
    moved *= load.parameters
    element_bytes = 2 if load.teacher_bfloat16(machine) else 4
    return moved + 2 * element_bytes * sum(load.split_sizes(candidate))


def _computed_again(load: Workload, candidate: Candidate) -> float:
    """Returns the FLOPs that activation checkpointing recomputes, as a fraction of forward's FLOPs.

    The result is 0 for a candidate without activation checkpointing.
    """
    if not candidate.checkpointing:
        return 0.0
    images = candidate.micro_batch_size
    without, with_them = (load.counts[c].step_flops(images).hardware for c in (False, True))
    return (with_them - without) / load.counts[False].flops("forward", images)


def _hooked(load: Workload, candidate: Candidate, counts: Counts) -> float:
    """Returns the number of module forwards and backwards with DeepSpeed's hooks in a micro-batch.

    A block that is gathered at once counts as `WHOLE_BLOCK` modules.
    """

    def passes(phase: str) -> float:
        return counts.modules.get(phase, 0) + WHOLE_BLOCK * counts.blocks.get(phase, 0)

    hooked = 0.0
    if candidate.stage == 3:  # Forward, backward, what backward computes again, a first pass.
        hooked += 2 * passes("forward") + passes("backward") + passes("first_pass")
    if split := load.split_sizes(candidate):
        # A teacher's share of the modules is taken to be that of the tensors.
        hooked += passes("inference") * len(split) / len(load.teacher_sizes)
    return hooked


def _update(load: Workload, candidate: Candidate, machine: Machine) -> float:
    """Returns the seconds of the optimiser in a step, with gradient norm and clipping.

    Args:
        load: The training run.
        candidate: The settings, of which the stage counts: at stage 0 a rank steps all parameters.
        machine: The hardware.
    """
    bandwidth = reached(machine.rates)[1]
    # Each master is read, and the new parameter is written. Stage 0 steps the parameters
    # themselves, without a copy.
    copied = 4 + load.compute_bytes(machine) if candidate.stage else 0
    if load.phases:
        update = load.phases.update + copied / bandwidth
    else:
        update = (OPTIMIZER_BYTES + MOMENT_BYTES * load.moments + copied) / bandwidth
    return update * load.parameters / (machine.cluster.gpus if candidate.stage else 1)
