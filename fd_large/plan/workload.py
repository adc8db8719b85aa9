"""The workload of a plan: a task's counts and the images of a step."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import chain

from fd_large.plan.candidate import Candidate
from fd_large.plan.cluster import Machine
from fd_large.plan.counts import NOTHING, Counts, Line, of_students, sizes
from fd_large.plan.memory import persistence_threshold, sums_in_float32
from fd_large.plan.phases import Phases
from fd_large.plan.phases import of_students as students_phases


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A training run, with the counts that do not depend on the candidate.

    Attributes:
        counts: A micro-batch without activation checkpointing (False) and with it (True), as the
            planned card runs it.
        global_batch_size: Images of a step.
        frozen_dtype: Data type of the teachers, as in the recipe: auto, float32 or bfloat16; of
            several that differ, float32.
        moments: Float32 numbers that the optimiser keeps of each parameter.
        may_split_frozen: Whether the frozen models may be split over ranks, as teachers may.
        norm_group: Images that share statistics of batch norms: a micro-batch holds a multiple of
            them, or all of a rank's images in a step.
        phases: Measured seconds of a step's phases; None to compute times from counts and the
            card's rates.
    """

    counts: Mapping[bool, Counts]
    global_batch_size: int
    frozen_dtype: str = "auto"
    moments: int = 2
    may_split_frozen: bool = True
    norm_group: int = 1
    phases: Phases | None = None

    @cached_property
    def student_sizes(self) -> tuple[int, ...]:
        """Elements of each trained tensor: the student and its heads."""
        return tuple(sizes(self.counts[False].student))

    @cached_property
    def teachers(self) -> tuple[tuple[int, ...], ...]:
        """Elements of each tensor of each teacher, in the order of the recipe."""
        return tuple(tuple(sizes(model)) for model in self.counts[False].frozen)

    @cached_property
    def teacher_sizes(self) -> tuple[int, ...]:
        """Elements of each tensor of all teachers; empty without one."""
        return tuple(chain.from_iterable(self.teachers))

    @cached_property
    def smallest_first(self) -> tuple[int, ...]:
        """Indices of the teachers in `teachers`, the smallest first."""
        totals = [sum(teacher) for teacher in self.teachers]
        return tuple(sorted(range(len(totals)), key=totals.__getitem__))

    def split_sizes(self, candidate: Candidate) -> tuple[int, ...]:
        """Returns the elements of each tensor of a candidate's sharded teachers."""
        if candidate.teacher == "replicated":
            return ()
        split = self.smallest_first[candidate.whole :]
        return tuple(chain.from_iterable(self.teachers[place] for place in split))

    @cached_property
    def threshold(self) -> int:
        """Tensors of at most this many elements stay whole on every rank."""
        return persistence_threshold([*self.student_sizes, *self.teacher_sizes])

    @cached_property
    def parameters(self) -> int:
        """Trained parameters."""
        return sum(self.student_sizes)

    def accumulation(self, candidate: Candidate, machine: Machine) -> int:
        """Micro-batches of a rank in a step."""
        share = self.global_batch_size // machine.cluster.gpus
        return max(1, share // candidate.micro_batch_size)

    def counts_of(self, candidate: Candidate, machine: Machine) -> Counts:
        """Counts of each micro-batch of a step."""
        counts = self.counts[candidate.checkpointing]
        return counts.in_step_of(self.accumulation(candidate, machine))

    def compute_bytes(self, machine: Machine) -> int:
        """Bytes of a trained parameter in the data type of matrix products."""
        return 2 if machine.rates.bfloat16 else 4

    def sum_bytes(self, machine: Machine) -> int:
        """Bytes of a gradient element in communication."""
        summed = sums_in_float32(machine.cluster.gpus, bfloat16=machine.rates.bfloat16)
        return 4 if summed else self.compute_bytes(machine)

    def teacher_bfloat16(self, machine: Machine) -> bool:
        """Whether the teacher is bfloat16."""
        return frozen_in_bfloat16(self.frozen_dtype, machine.rates.bfloat16)


def together(loads: Sequence[Workload], shared: Line = NOTHING) -> Workload:
    """Returns the joint workload of several students that share the frozen models' forward.

    Args:
        loads: The work of each student alone.
        shared: Bytes of a micro-batch that all students share; see `counts.of_students`.
    """
    first = loads[0]
    if len(loads) == 1:
        return first
    counts = {c: of_students([load.counts[c] for load in loads], shared) for c in first.counts}
    measured = [load.phases for load in loads if load.phases]
    phases = None
    if len(measured) == len(loads):
        phases = students_phases(measured, [load.parameters for load in loads])
    group = math.lcm(*(load.norm_group for load in loads))
    return replace(first, counts=counts, phases=phases, norm_group=group)


def frozen_in_bfloat16(dtype: str, bfloat16: bool) -> bool:
    """Returns whether a frozen model is bfloat16: by its recipe, or else by the run's precision."""
    return bfloat16 if dtype == "auto" else dtype == "bfloat16"
