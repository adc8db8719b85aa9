"""How long a step takes: computation, communication, optimizer.

Computation of a micro batch:

- matrix products: each takes the longer of FLOPs / matmul rate and bytes / bandwidth; backward is
  two products for one;
- the rest: bytes moved (`plan.traffic`) / bandwidth, the gradients of the parameters, and the
  copies of gathered ones;
- with checkpoints, the student's blocks once more;
- starting the operations from Python, and DeepSpeed's hooks around each module at stage 3: Python
  runs ahead of a GPU, so that this counts only where it is longer than the rest together; on CPU
  ranks it adds up.

Communication of a micro batch; S, T: one gather or scatter of student, teacher (`plan.cluster`):

| ZeRO | student, each micro batch            | student, each step         |
|------|--------------------------------------|------------------------------|
| 1    | none                                 | gradients 2 S, parameters S  |
| 2    | gradients 2 S                        | parameters S                 |
| 3    | S forward, R backward, gradients S   | none                         |

All in the compute type. DeepSpeed 0.19.8 all-reduces the gradients at stages 1 and 2, a scatter and
a gather, where stage 3 scatters. R is S without what is still there when backward begins: layers
that are used again within `stage3_max_reuse_distance` elements, forward and back, stay whole.

A split teacher adds T a micro batch, over all ranks or inside each node. With hpZ the gather of
backward stays inside a node. On GPUs communication runs beside computation, and only the longer of
the two counts; CPU ranks, whose cores do both, add them up. After the last micro batch come the
collectives of the step and the optimizer, which moves 46 bytes (bfloat16) for each parameter of
the rank's share.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal

from fd_large.plan import flops, traffic
from fd_large.plan.peak import Peak, peak_of
from fd_large.plan.rates import Rates
from fd_large.plan.setting import Machine, Setting, Workload, bucket_elements

# Of a step and parameter of the rank's share, float32: the norm reads 4, clipping scales 8,
# AdamW reads gradient, master and moments and writes the last three 28, the new parameter reads 4;
# and writes its own bytes.
OPTIMIZER_BYTES = 44
# A parameter's gradient is written, copied into a bucket (read, written), and added to the
# accumulated one (read), in the compute type.
GRADIENT_PASSES = 4
# Calls of a block that Python starts, views included, as torch dispatches them.
OPERATIONS = {
    "fused": {"forward": 39, "backward": 95, "inference": 40},
    "reference": {"forward": 100, "backward": 177, "inference": 98},
}
# Modules of a block: DeepSpeed's hooks at stage 3 run before and after each, and take as long as so
# many calls (measured with 0.19.8 on an idle CPU rank: 0.24 ms a module and pass, 9 us a call).
MODULES = {"swinv2": 13, "swin": 9, "vit": 9}
HOOK_CALLS = 27
# Half of DeepSpeed's `stage3_max_reuse_distance`, which counts the way forward and back.
KEPT_ELEMENTS = 500_000_000


@dataclass(frozen=True, kw_only=True)
class Seconds:
    """What a step takes.

    Attributes:
        products: Matrix products of a micro batch.
        rest: Everything else that a micro batch computes.
        communication: Of a micro batch.
        update: Collectives and optimizer after the last micro batch.
        accumulation: Micro batches.
        overlap: Whether communication runs beside computation.
    """

    products: float
    rest: float
    communication: float
    update: float
    accumulation: int
    overlap: bool

    @property
    def computation(self) -> float:
        """Of a micro batch."""
        return self.products + self.rest

    @property
    def total(self) -> float:
        """Of a step."""
        both = self.computation, self.communication
        return self.accumulation * (max(both) if self.overlap else sum(both)) + self.update


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A setting with its figures.

    Attributes:
        setting: What was chosen.
        memory: Bytes of a rank.
        seconds: Of a step.
        flops: Of a micro batch.
        images: Of a step, over all ranks.
        peak: FLOP/s of a card.
    """

    setting: Setting
    memory: Peak
    seconds: Seconds
    flops: flops.StepFlops
    images: int
    peak: float

    @property
    def images_per_second(self) -> float:
        """Of the whole cluster."""
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


def estimate(load: Workload, setting: Setting, machine: Machine) -> Estimate:
    """Returns memory and time of a setting; the memory may be more than the card has."""
    share = load.run.batch.global_batch_size // machine.cluster.gpus
    products, rest = _computation(load, setting, machine)
    again = not machine.fused and machine.recomputes_attention
    return Estimate(
        setting=setting,
        memory=peak_of(load, setting, machine),
        seconds=Seconds(
            products=products,
            rest=rest,
            communication=_communication(load, setting, machine),
            update=_update(load, setting, machine),
            accumulation=max(1, share // setting.micro_batch_size),
            overlap=machine.rates.overlap,
        ),
        flops=flops.of_run(
            setting.of(load.run),
            micro_batch_size=setting.micro_batch_size,
            attention_recomputed=again or machine.fused,
        ),
        images=load.run.batch.global_batch_size,
        peak=machine.rates.peak,
    )


def _computation(load: Workload, setting: Setting, machine: Machine) -> tuple[float, float]:
    run, rates, batch = load.run, machine.rates, setting.micro_batch_size
    kernels: traffic.Kernels = "fused" if machine.fused else "reference"
    student, teacher = run.student_architecture(), run.teacher_architecture()

    def products(table: Iterable[flops.Product], kind: Literal["forward", "backward"]) -> float:
        return sum(product_seconds(p, kind, batch, machine) for p in table)

    def moved(phase: traffic.Phase) -> dict[str, float]:
        inference = phase == "inference"
        return traffic.moved(
            teacher if inference else student,
            phase,
            image_size=flops.teacher_image_size(run) if inference else run.data.image_size,
            kernels=kernels,
            bfloat16=load.teacher_bfloat16(machine) if inference else rates.bfloat16,
            float32_stream=not inference and run.student.residual_dtype == "float32",
        )

    def rest(by_class: dict[str, float]) -> float:
        return sum(batch * moved / rates.bytes_rate(kind) for kind, moved in by_class.items())

    forward = moved("forward")
    matrix = products(load.student_products, "forward")
    matrix += products(load.student_products, "backward")
    matrix += products(load.teacher_products, "forward")
    other = rest(forward) + rest(moved("backward")) + rest(moved("inference"))
    if setting.checkpointing:
        share = 1 / run.student.checkpoint_every
        matrix += share * products([p for p in load.student_products if p.in_block], "forward")
        other += share * rest(forward)
    if machine.recomputes_attention and not machine.fused:
        matrix += products([p for p in load.student_products if p.kind == "logits"], "forward")
        other += rest({"attention": forward["attention"]})
    size = load.compute_bytes(machine)
    passes = GRADIENT_PASSES if setting.stage or machine.cluster.gpus > 1 else 1
    other += passes * size * load.parameters / rates.bandwidth
    if setting.stage == 3:  # What is gathered, for forward and for backward, is copied in place.
        other += 2 * (1 + _gathered_again(load)) * size * load.parameters / rates.bandwidth
    if setting.teacher != "replicated":
        own = 2 if load.teacher_bfloat16(machine) else 4
        other += 2 * own * sum(load.teacher) / rates.bandwidth
    starting = _starts(load, setting, kernels) * rates.launch_seconds
    if not rates.overlap:
        return matrix, other + starting
    return matrix, max(other, starting - matrix)


def _starts(load: Workload, setting: Setting, kernels: traffic.Kernels) -> int:
    """Calls that Python makes in a micro batch, hooks of ZeRO-3 included."""
    count = OPERATIONS[kernels]
    student, teacher = load.run.student_architecture(), load.run.teacher_architecture()
    passes = 3 if setting.checkpointing else 2
    calls = count["forward"] * (passes - 1) + count["backward"]
    if setting.stage == 3:
        calls += passes * HOOK_CALLS * MODULES[str(student.family)]
    taught = count["inference"]
    if setting.teacher != "replicated":
        taught += HOOK_CALLS * MODULES.get(str(teacher.family), 9)
    return calls * sum(student.depths) + taught * sum(getattr(teacher, "depths", ()))


def product_seconds(
    product: flops.Product,
    kind: Literal["forward", "backward"],
    batch: int,
    machine: Machine,
) -> float:
    """Returns how long the products of an entry take for `batch` images."""
    rates = machine.rates
    inside = product.kind in flops.ATTENTION
    computed = product.forward(batch) if kind == "forward" else product.backward(batch)
    seconds = computed / ((rates.batched_matmul if inside else 0.0) or rates.matmul)
    if inside and machine.fused:  # Its maps never leave the chip.
        return seconds
    return max(seconds, _product_bytes(product, kind, batch, rates) / rates.bandwidth)


def _product_bytes(
    product: flops.Product, kind: Literal["forward", "backward"], batch: int, rates: Rates
) -> float:
    images = 1 if product.once else batch
    rows, inner, columns = product.rows, product.inner, product.columns
    if product.kind in flops.ATTENTION:
        elements = images * (rows * inner + inner * columns + rows * columns)
    else:  # Weights are read once for the whole batch.
        elements = images * rows * (inner + columns) + inner * columns
    passes = 1 if kind == "forward" or not product.input_gradient else 2
    return passes * (2 if rates.bfloat16 else 4) * product.count * elements


def _communication(load: Workload, setting: Setting, machine: Machine) -> float:
    cluster, rates = machine.cluster, machine.rates
    whole = load.compute_bytes(machine) * load.parameters
    calls = sum(1 for n in load.student if n > load.threshold)
    buckets = _buckets(load, setting)
    total = 0.0
    if setting.stage == 3:
        again, span = _gathered_again(load), "node" if setting.hpz else "all"
        total += cluster.seconds(whole, rates, calls=calls)
        total += again * cluster.seconds(whole, rates, span=span, calls=calls)
        total += cluster.seconds(whole, rates, calls=buckets)
    elif setting.stage == 2:  # An all-reduce is a scatter and a gather.
        total += 2 * cluster.seconds(whole, rates, calls=buckets)
    if setting.teacher != "replicated":
        size = 2 if load.teacher_bfloat16(machine) else 4
        calls = sum(1 for n in load.teacher if n > load.threshold)
        span = "node" if setting.teacher == "node" else "all"
        total += cluster.seconds(size * sum(load.teacher), rates, span=span, calls=calls)
    return total


def _gathered_again(load: Workload) -> float:
    """Share of the parameters that ZeRO-3 gathers a second time, for backward."""
    return max(0.0, 1 - KEPT_ELEMENTS / load.parameters)


def _buckets(load: Workload, setting: Setting) -> int:
    return -(-load.parameters // bucket_elements(setting.stage, load.parameters))


def _update(load: Workload, setting: Setting, machine: Machine) -> float:
    cluster, rates = machine.cluster, machine.rates
    # At stage 0 the parameters are stepped themselves: 4 + 8 + 28 bytes, and no copy of them.
    split = 1 if setting.stage == 0 else cluster.gpus
    moved = OPTIMIZER_BYTES + load.compute_bytes(machine) if setting.stage else OPTIMIZER_BYTES - 4
    total = moved * load.parameters / split / rates.bandwidth
    whole = load.compute_bytes(machine) * load.parameters
    if setting.stage in (1, 2):
        total += cluster.seconds(whole, rates)
    if setting.stage <= 1:
        total += 2 * cluster.seconds(whole, rates, calls=_buckets(load, setting))
    return total
