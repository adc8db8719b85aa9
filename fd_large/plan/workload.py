"""What is planned: a student, its teacher and their images, with all that is counted once."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from fd_large.plan import flops
from fd_large.plan.cluster import Machine
from fd_large.plan.memory import persistence_threshold, student_sizes, teacher_sizes
from fd_large.recipes.architectures import resolve
from fd_large.recipes.family import FamilyArchitecture, Transformer
from fd_large.recipes.sections import Student

if TYPE_CHECKING:
    from fd_large.tasks.distillation.section import Teacher


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A distillation, with what does not depend on the candidate counted once.

    Attributes:
        student: Its architecture.
        teacher: Its architecture.
        image_size: Side of the student's images, in pixels.
        teacher_image_size: Side of the teacher's images, in pixels.
        global_batch_size: Images of a step.
        float32_stream: Whether the student's residual stream is float32.
        checkpoint_every: Under activation checkpointing, every k-th block is checkpointed.
        teacher_dtype: Of the recipe: auto, float32 or bfloat16.
        student_sizes: Elements of each trained tensor: student, then projection.
        teacher_sizes: Elements of each tensor of the teacher.
        threshold: Tensors of at most this many elements stay whole on every rank.
        student_products: Matrix products of student and projection.
        teacher_products: Matrix products of the teacher.
    """

    student: Transformer
    teacher: FamilyArchitecture
    image_size: int
    teacher_image_size: int
    global_batch_size: int
    float32_stream: bool
    checkpoint_every: int
    teacher_dtype: str
    student_sizes: tuple[int, ...]
    teacher_sizes: tuple[int, ...]
    threshold: int
    student_products: tuple[flops.Product, ...]
    teacher_products: tuple[flops.Product, ...]

    @classmethod
    def of(
        cls,
        student: Student,
        teacher: Teacher,
        *,
        image_size: int,
        global_batch_size: int,
        teacher_image_size: int = 0,
    ) -> Workload:
        """Counts a run.

        Args:
            student: Section of the recipe.
            teacher: Section of the recipe.
            image_size: Side of the images, in pixels.
            global_batch_size: Images of a step.
            teacher_image_size: Side of the teacher's images, in pixels; 0: as the teacher needs.

        Raises: ConfigError: if the teacher cannot be counted.
        """
        trained = resolve(student.model, student.architecture)
        frozen = resolve(teacher.model, teacher.architecture)
        seen = teacher_image_size or frozen.fixed_image_size or image_size
        own, others = student_sizes(trained, frozen, image_size=image_size), teacher_sizes(frozen)
        return cls(
            student=trained,
            teacher=frozen,
            image_size=image_size,
            teacher_image_size=seen,
            global_batch_size=global_batch_size,
            float32_stream=student.residual_dtype == "float32",
            checkpoint_every=student.checkpoint_every,
            teacher_dtype=teacher.dtype,
            student_sizes=tuple(own),
            teacher_sizes=tuple(others),
            threshold=persistence_threshold([*own, *others]),
            student_products=(
                *flops.products(trained, image_size=image_size, size_rule=student.size_rule),
                flops.projection(trained, frozen, image_size=image_size),
            ),
            teacher_products=tuple(flops.products(frozen, image_size=seen)),
        )

    @property
    def parameters(self) -> int:
        """Parameters of student and projection."""
        return sum(self.student_sizes)

    @property
    def checkpointed_share(self) -> float:
        """Fraction of the student's blocks that activation checkpointing would checkpoint."""
        return flops.checkpointed_share(self.student.depths, self.checkpoint_every)

    def step_flops(
        self, *, micro_batch_size: int, checkpointing: bool, attention_recomputed: bool
    ) -> flops.StepFlops:
        """Returns the FLOPs of one micro-batch; see `flops.step_flops`."""
        return flops.step_flops(
            self.student_products,
            self.teacher_products,
            micro_batch_size=micro_batch_size,
            attention_recomputed=attention_recomputed,
            checkpointed_share=self.checkpointed_share if checkpointing else 0.0,
        )

    def compute_bytes(self, machine: Machine) -> int:
        """Bytes of a student's parameter in the data type of matrix products."""
        return 2 if machine.rates.bfloat16 else 4

    def teacher_bfloat16(self, machine: Machine) -> bool:
        """Whether the teacher is bfloat16."""
        dtype = self.teacher_dtype
        return machine.rates.bfloat16 if dtype == "auto" else dtype == "bfloat16"
