"""What a plan chooses among, and the run and the machine that it chooses for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from fd_large.plan import flops
from fd_large.plan.cluster import Cluster
from fd_large.plan.memory import persistence_threshold, student_sizes, teacher_sizes
from fd_large.plan.rates import Rates
from fd_large.plan.traffic import Kernels
from fd_large.recipes.run import Run

# As ds_configs/*.json have them; `bucket_elements` knows the smaller one.
BUCKET_ELEMENTS, LEAST_BUCKET_ELEMENTS = 100_000_000, 8_000_000
PREFETCH_ELEMENTS = 51_000_000


def bucket_elements(stage: int, parameters: int) -> int:
    """Returns the gradients that are reduced together.

    Stage 3 owns a buffer of them. At stages 1 and 2 so few that reductions begin early in backward,
    but no more than some thirty messages, each of which costs a start.
    """
    if stage == 3:
        return BUCKET_ELEMENTS
    return min(BUCKET_ELEMENTS, max(LEAST_BUCKET_ELEMENTS, parameters // 30))


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What a user may choose.

    Attributes:
        stage: ZeRO.
        hpz: A second copy of the parameters inside each node.
        teacher: Its placement.
        checkpointing: Whether blocks keep their inputs only.
        micro_batch_size: Images of a rank and forward.
    """

    stage: Literal[0, 1, 2, 3]
    hpz: bool = False
    teacher: Literal["replicated", "sharded", "node"] = "replicated"
    checkpointing: bool = False
    micro_batch_size: int = 1

    def of(self, run: Run) -> Run:
        """Returns the run with what the setting changes of the recipe."""
        mode = run.student.activation_checkpointing
        if self.checkpointing != (mode != "off"):
            mode = "every" if self.checkpointing else "off"
        return replace(
            run,
            student=replace(run.student, activation_checkpointing=mode),
            teacher=replace(run.teacher, placement=self.teacher),
            batch=replace(run.batch, micro_batch_size=self.micro_batch_size),
        )

    def flags(self, run: Run) -> str:
        """Returns the words that make `train` take this setting in place of the recipe's own."""
        mine, theirs = self.of(run), run
        words = []
        for name, ours, was in (
            ("batch.micro_batch_size", mine.batch.micro_batch_size, theirs.batch.micro_batch_size),
            ("teacher.placement", mine.teacher.placement, theirs.teacher.placement),
            (
                "student.activation_checkpointing",
                mine.student.activation_checkpointing,
                theirs.student.activation_checkpointing,
            ),
        ):
            if ours != was:
                words.append(f"--{name} {ours}")
        return " ".join(words)

    def deepspeed(self, parameters: int) -> dict[str, Any]:
        """Returns the DeepSpeed JSON for a student of so many; the run fills its "auto" values."""
        zero: dict[str, Any] = {"stage": self.stage}
        if self.stage > 0:
            zero["overlap_comm"] = True
            zero["reduce_bucket_size"] = bucket_elements(self.stage, parameters)
        if self.stage in (1, 2):
            zero["reduce_scatter"] = False
            zero["allgather_bucket_size"] = BUCKET_ELEMENTS
        elif self.stage == 3:
            zero["stage3_prefetch_bucket_size"] = PREFETCH_ELEMENTS
            zero["stage3_param_persistence_threshold"] = "auto"
            if self.hpz:
                zero["zero_hpz_partition_size"] = "auto"
        return {
            "train_micro_batch_size_per_gpu": "auto",
            "gradient_accumulation_steps": "auto",
            "gradient_clipping": "auto",
            "bf16": {"enabled": "auto"},
            "data_types": {"grad_accum_dtype": "fp32"},
            "zero_optimization": zero,
        }


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where a run is planned.

    Attributes:
        cluster: Ranks, nodes, network.
        rates: Of a card and its links.
        kernels: What runs beside the matrix products.
    """

    cluster: Cluster
    rates: Rates
    kernels: Kernels

    @property
    def fused(self) -> bool:
        """Whether fused kernels run; they exist for bfloat16 on GPUs."""
        return self.kernels == "fused" and self.rates.bfloat16

    @property
    def recomputes_attention(self) -> bool:
        """Whether plain attention makes its maps again in backward, as it does on GPUs."""
        return self.rates.overlap


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A run, with what does not depend on the setting counted once.

    Attributes:
        run: The recipe's.
        student: Elements of each trained tensor.
        teacher: Elements of each tensor of the teacher.
        threshold: Tensors of at most so many elements stay whole on every rank.
        student_products: Of student and projection.
        teacher_products: Of the teacher.
    """

    run: Run
    student: tuple[int, ...]
    teacher: tuple[int, ...]
    threshold: int
    student_products: tuple[flops.Product, ...]
    teacher_products: tuple[flops.Product, ...]

    @classmethod
    def of(cls, run: Run) -> Workload:
        """Counts a run.

        Raises: ConfigError: if the teacher is not countable.
        """
        student, teacher = student_sizes(run), teacher_sizes(run)
        return cls(
            run=run,
            student=tuple(student),
            teacher=tuple(teacher),
            threshold=persistence_threshold([*student, *teacher]),
            student_products=tuple(flops.student_products(run)),
            teacher_products=tuple(flops.teacher_products(run)),
        )

    @property
    def parameters(self) -> int:
        """Of student and projection."""
        return sum(self.student)

    def compute_bytes(self, machine: Machine) -> int:
        """Bytes of a student's parameter in the compute type."""
        return 2 if machine.rates.bfloat16 else 4

    def teacher_bfloat16(self, machine: Machine) -> bool:
        """Whether the teacher is bfloat16."""
        dtype = self.run.teacher.dtype
        return machine.rates.bfloat16 if dtype == "auto" else dtype == "bfloat16"
