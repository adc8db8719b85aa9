"""What a rank holds at its fullest, in backward: more than `plan.memory` counts between steps."""

from __future__ import annotations

from dataclasses import dataclass

from fd_large.plan import traffic
from fd_large.plan.memory import Placement, held
from fd_large.plan.rates import Rates
from fd_large.plan.setting import (
    PREFETCH_ELEMENTS,
    Machine,
    Setting,
    Workload,
    bucket_elements,
)

# DeepSpeed's `stage3_max_live_parameters`: gathered layers are let go past so many elements.
LIVE_ELEMENTS = 1_000_000_000
# The driver, the libraries and their buffers on a GPU; assumed.
FIXED_BYTES = 2e9
# Share of the memory that a plan may fill: allocators fragment. The engine's probe takes the same.
HEADROOM = 0.92


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes of a rank at its fullest.

    Attributes:
        states: Parameters, masters, moments, accumulated gradients; hpZ's copy.
        teacher: Its share of the teacher.
        activations: What forward keeps for backward, and one live block under checkpointing.
        buffers: Gathered layers, buckets, gradients on their way, the driver.
    """

    states: float
    teacher: float
    activations: float
    buffers: float

    @property
    def total(self) -> float:
        """All of them."""
        return self.states + self.teacher + self.activations + self.buffers

    def fits(self, rates: Rates) -> bool:
        """Whether a card holds it."""
        return self.total <= HEADROOM * rates.memory_bytes


def peak_of(load: Workload, setting: Setting, machine: Machine) -> Peak:
    """Returns what a rank holds at its fullest."""
    cluster, rates, run = machine.cluster, machine.rates, load.run
    size = load.compute_bytes(machine)
    bucket = bucket_elements(setting.stage, load.parameters)
    memory = held(load.student, load.teacher, placement_of(load, setting, machine))
    device = memory.device
    states: float = device.total - device.teacher - device.buckets
    buffers: float = device.buckets
    if setting.stage == 3:
        states += memory.hpz_copy
        buffers += size * min(load.parameters, LIVE_ELEMENTS)
        buffers += size * 2 * bucket  # Gradients being reduced, and those that come.
    elif setting.stage == 2:
        # Buckets as above; the share's gradients, which are freed after the step.
        buffers += size * 3 * bucket + 4 * load.parameters / cluster.gpus
    elif setting.stage == 1 and rates.bfloat16:
        # Each gradient goes into its float32 sum at once; a bucket of sums is sent at a time.
        buffers += size * (max(load.student) + bucket)
    else:
        buffers += size * load.parameters  # Every gradient.
    if setting.teacher != "replicated" and cluster.gpus > 1:
        buffers += 2 * size * min(PREFETCH_ELEMENTS, sum(load.teacher))
    kept = traffic.kept(
        run.student_architecture(),
        image_size=run.data.image_size,
        kernels="fused" if machine.fused else "reference",
        bfloat16=rates.bfloat16,
        float32_stream=run.student.residual_dtype == "float32",
        keep_maps=not machine.fused and not machine.recomputes_attention,
        checkpoint_every=run.student.checkpoint_every if setting.checkpointing else 0,
    )
    tables = traffic.tables_kept(run.student_architecture(), image_size=run.data.image_size)
    return Peak(
        states=states,
        teacher=device.teacher,
        activations=kept * setting.micro_batch_size + tables,
        buffers=buffers + (FIXED_BYTES if rates.overlap else 0.0),
    )


def placement_of(load: Workload, setting: Setting, machine: Machine) -> Placement:
    """Returns where the bytes of a setting lie."""
    cluster = machine.cluster
    return Placement(
        stage=setting.stage,
        world_size=cluster.gpus,
        node_size=cluster.node_size,
        bfloat16=machine.rates.bfloat16,
        teacher_bfloat16=load.teacher_bfloat16(machine),
        teacher_placement=setting.teacher,
        persistence_threshold=load.threshold,
        teacher_persistence_threshold=load.threshold,
        hpz_size=cluster.node_size if setting.hpz else 1,
        reduce_bucket_size=bucket_elements(setting.stage, load.parameters),
    )
