"""What a plan chooses among, and the run and the machine that it chooses for."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, Literal

from fd_large.plan import flops
from fd_large.plan.cluster import Cluster
from fd_large.plan.memory import student_sizes, teacher_sizes
from fd_large.plan.rates import Rates
from fd_large.plan.traffic import Kernels
from fd_large.recipes.run import Run

# As ds_configs/*.json have them.
BUCKET_ELEMENTS = 100_000_000
PREFETCH_ELEMENTS = 51_000_000
# Tensors so small that they are a hundredth of all elements stay whole on every rank.
PERSISTENCE_SHARE = 0.01


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

    def deepspeed(self) -> dict[str, Any]:
        """Returns the DeepSpeed JSON; the run fills its "auto" values."""
        zero: dict[str, Any] = {
            "stage": self.stage,
            "overlap_comm": True,
            "reduce_bucket_size": BUCKET_ELEMENTS,
        }
        if self.stage < 3:
            zero["allgather_bucket_size"] = BUCKET_ELEMENTS
        else:
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


def persistence_threshold(sizes: list[int], *, share: float = PERSISTENCE_SHARE) -> int:
    """Returns the largest size up to which all tensors together are at most `share` of the sum."""
    left, threshold = share * sum(sizes), 0
    for size in sorted(set(sizes)):
        left -= size * sizes.count(size)
        if left < 0:
            break
        threshold = size
    return threshold
