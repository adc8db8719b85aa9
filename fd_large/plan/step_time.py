"""How long a step takes: computation, communication, optimizer.

Computation of a micro-batch:

- matrix products: each takes the longer of FLOPs / product rate and bytes / bandwidth; the backward
  pass takes two products for one;
- the rest: bytes moved (`plan.traffic`) / bandwidth, with the gradients of the parameters and the
  copies of gathered parameters;
- with checkpoints, the student's blocks once more;
- starting the operations from Python, and DeepSpeed's hooks around each module at stage 3. Python
  runs ahead of a GPU, so this counts only if it takes longer than all the rest; on CPU ranks it is
  added.

Communication of a micro-batch, where S and T are one gather or scatter of student and teacher
(`plan.cluster`):

| ZeRO | student, each micro-batch            | student, each step           |
|------|--------------------------------------|------------------------------|
| 1    | none                                 | gradients 2 S, parameters S  |
| 2    | gradients 2 S                        | parameters S                 |
| 3    | S forward, R backward, gradients S   | none                         |

All travels in the data type of the parameters. DeepSpeed 0.19.8 all-reduces the gradients at stages
1 and 2 (a scatter and a gather), where stage 3 scatters them. R is S without what is still whole
when the backward pass begins: layers that are used again within `stage3_max_reuse_distance`
elements, forward and back, stay whole.

A split teacher adds T per micro-batch, over all ranks or inside each node. With hpZ the backward
pass gathers inside a node. On GPUs communication runs beside computation, and the longer of the two
counts; CPU ranks, whose cores do both, take the sum. After the last micro-batch come the
collectives of the step and the optimizer, which moves 46 bytes (bfloat16) for each parameter of the
rank's shard.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from fd_large.plan import flops, traffic
from fd_large.plan.candidate import Candidate, bucket_elements
from fd_large.plan.cluster import Machine
from fd_large.plan.peak_memory import PeakMemory, peak_memory
from fd_large.plan.rates import Rates
from fd_large.plan.workload import Workload

# Bytes that a step moves per parameter of the rank's shard, in float32: 4 for the norm, 8 for
# clipping, 28 for AdamW (reads gradient, master and moments, writes the last three), 4 read for the
# new parameter; that writes its own bytes besides.
OPTIMIZER_BYTES = 44
# A parameter's gradient is written, copied into a bucket (read, written), and added to the
# accumulated one (read), in the data type of the parameters.
GRADIENT_PASSES = 4
# Calls that Python makes for a block, views included, as torch dispatches them.
OPERATIONS = {
    "fused": {"forward": 39, "backward": 95, "inference": 40},
    "reference": {"forward": 100, "backward": 177, "inference": 98},
}
# Modules of a block. DeepSpeed's hooks at stage 3 run before and after each, and take as long as
# HOOK_CALLS calls (measured with 0.19.8 on an idle CPU rank: 0.24 ms per module and pass, 9 us per
# call).
MODULES = {"swinv2": 13, "swin": 9, "vit": 9}
HOOK_CALLS = 27
# Half of DeepSpeed's `stage3_max_reuse_distance`, which counts forward and back.
KEPT_ELEMENTS = 500_000_000


@dataclass(frozen=True, kw_only=True)
class StepSeconds:
    """Seconds of a step.

    Attributes:
        products: Matrix products of a micro-batch.
        rest: Everything else that a micro-batch computes.
        communication: Communication of a micro-batch.
        finish: Collectives and optimizer after the last micro-batch.
        accumulation: Number of micro-batches.
        overlap: Whether communication runs beside computation.
    """

    products: float
    rest: float
    communication: float
    finish: float
    accumulation: int
    overlap: bool

    @property
    def computation(self) -> float:
        """Computation of a micro-batch."""
        return self.products + self.rest

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
    flops: flops.StepFlops
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
    share = load.global_batch_size // machine.cluster.gpus
    products, rest = _computation(load, candidate, machine)
    again = not machine.fused and machine.recomputes_attention
    return Estimate(
        candidate=candidate,
        memory=peak_memory(load, candidate, machine),
        seconds=StepSeconds(
            products=products,
            rest=rest,
            communication=_communication(load, candidate, machine),
            finish=_finish(load, candidate, machine),
            accumulation=max(1, share // candidate.micro_batch_size),
            overlap=machine.rates.overlap,
        ),
        flops=load.step_flops(
            micro_batch_size=candidate.micro_batch_size,
            checkpointing=candidate.checkpointing,
            attention_recomputed=again or machine.fused,
        ),
        images=load.global_batch_size,
        peak=machine.rates.peak,
    )


def _computation(load: Workload, candidate: Candidate, machine: Machine) -> tuple[float, float]:
    rates, batch = machine.rates, candidate.micro_batch_size
    kernels: traffic.Kernels = "fused" if machine.fused else "reference"

    def products(table: Iterable[flops.Product], kind: Literal["forward", "backward"]) -> float:
        return sum(product_seconds(p, kind, batch, machine) for p in table)

    def moved(phase: traffic.Phase) -> dict[str, float]:
        inference = phase == "inference"
        return traffic.moved(
            load.teacher if inference else load.student,
            phase,
            image_size=load.teacher_image_size if inference else load.image_size,
            kernels=kernels,
            bfloat16=load.teacher_bfloat16(machine) if inference else rates.bfloat16,
            float32_stream=not inference and load.float32_stream,
        )

    def rest(by_class: dict[str, float]) -> float:
        return sum(batch * moved / rates.bytes_rate(kind) for kind, moved in by_class.items())

    forward = moved("forward")
    matrix = products(load.student_products, "forward")
    matrix += products(load.student_products, "backward")
    matrix += products(load.teacher_products, "forward")
    other = rest(forward) + rest(moved("backward")) + rest(moved("inference"))
    if candidate.checkpointing:
        share = load.checkpointed_share
        matrix += share * products([p for p in load.student_products if p.in_block], "forward")
        other += share * rest(forward)
    if machine.recomputes_attention and not machine.fused:
        matrix += products([p for p in load.student_products if p.kind == "logits"], "forward")
        other += rest({"attention": forward["attention"]})
    size = load.compute_bytes(machine)
    passes = GRADIENT_PASSES if candidate.stage or machine.cluster.gpus > 1 else 1
    other += passes * size * load.parameters / rates.bandwidth
    if candidate.stage == 3:  # What is gathered, forward and backward, is copied in place.
        other += 2 * (1 + _gathered_again(load)) * size * load.parameters / rates.bandwidth
    if candidate.teacher != "replicated":
        own = 2 if load.teacher_bfloat16(machine) else 4
        other += 2 * own * sum(load.teacher_sizes) / rates.bandwidth
    starting = _starts(load, candidate, kernels) * rates.launch_seconds
    if not rates.overlap:
        return matrix, other + starting
    return matrix, max(other, starting - matrix)


def _starts(load: Workload, candidate: Candidate, kernels: traffic.Kernels) -> int:
    """Returns the calls that Python makes in a micro-batch, hooks of ZeRO-3 included."""
    count = OPERATIONS[kernels]
    student, teacher = load.student, load.teacher
    passes = 3 if candidate.checkpointing else 2
    calls = count["forward"] * (passes - 1) + count["backward"]
    if candidate.stage == 3:
        calls += passes * HOOK_CALLS * MODULES[str(student.family)]
    taught = count["inference"]
    if candidate.teacher != "replicated":
        taught += HOOK_CALLS * MODULES.get(str(teacher.family), 9)
    return calls * sum(student.depths) + taught * sum(getattr(teacher, "depths", ()))


def product_seconds(
    product: flops.Product,
    kind: Literal["forward", "backward"],
    batch: int,
    machine: Machine,
) -> float:
    """Returns the seconds of an entry's products for `batch` images."""
    rates = machine.rates
    inside = product.kind in flops.ATTENTION
    computed = product.forward(batch) if kind == "forward" else product.backward(batch)
    seconds = computed / ((rates.batched_matmul if inside else 0.0) or rates.matmul)
    if inside and machine.fused:  # Attention maps never leave the chip.
        return seconds
    return max(seconds, _product_bytes(product, kind, batch, rates) / rates.bandwidth)


def _product_bytes(
    product: flops.Product, kind: Literal["forward", "backward"], batch: int, rates: Rates
) -> float:
    images = 1 if product.once else batch
    rows, inner, columns = product.rows, product.inner, product.columns
    if product.kind in flops.ATTENTION:
        elements = images * (rows * inner + inner * columns + rows * columns)
    else:  # Weights are read once per batch.
        elements = images * rows * (inner + columns) + inner * columns
    passes = 1 if kind == "forward" or not product.input_gradient else 2
    return passes * (2 if rates.bfloat16 else 4) * product.count * elements


def _communication(load: Workload, candidate: Candidate, machine: Machine) -> float:
    cluster, rates = machine.cluster, machine.rates
    whole = load.compute_bytes(machine) * load.parameters
    calls = sum(1 for n in load.student_sizes if n > load.threshold)
    buckets = _buckets(load, candidate)
    total = 0.0
    if candidate.stage == 3:
        again, span = _gathered_again(load), "node" if candidate.hpz else "all"
        total += cluster.seconds(whole, rates, calls=calls)
        total += again * cluster.seconds(whole, rates, span=span, calls=calls)
        total += cluster.seconds(whole, rates, calls=buckets)
    elif candidate.stage == 2:  # An all-reduce is a scatter and a gather.
        total += 2 * cluster.seconds(whole, rates, calls=buckets)
    if candidate.teacher != "replicated":
        size = 2 if load.teacher_bfloat16(machine) else 4
        calls = sum(1 for n in load.teacher_sizes if n > load.threshold)
        span = "node" if candidate.teacher == "node" else "all"
        total += cluster.seconds(size * sum(load.teacher_sizes), rates, span=span, calls=calls)
    return total


def _gathered_again(load: Workload) -> float:
    """Returns the fraction of parameters that ZeRO-3 gathers again for the backward pass."""
    return max(0.0, 1 - KEPT_ELEMENTS / load.parameters)


def _buckets(load: Workload, candidate: Candidate) -> int:
    return -(-load.parameters // bucket_elements(candidate.stage, load.parameters))


def _finish(load: Workload, candidate: Candidate, machine: Machine) -> float:
    cluster, rates = machine.cluster, machine.rates
    # Stage 0 steps the parameters themselves: 4 + 8 + 28 bytes, and no copy.
    split = 1 if candidate.stage == 0 else cluster.gpus
    moved = (
        OPTIMIZER_BYTES + load.compute_bytes(machine) if candidate.stage else OPTIMIZER_BYTES - 4
    )
    total = moved * load.parameters / split / rates.bandwidth
    whole = load.compute_bytes(machine) * load.parameters
    if candidate.stage in (1, 2):
        total += cluster.seconds(whole, rates)
    if candidate.stage <= 1:
        total += 2 * cluster.seconds(whole, rates, calls=_buckets(load, candidate))
    return total
