"""The training run for which a plan is made, described by counts of a step's operations."""

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
    """A training run to plan, described by what does not depend on the candidate.

    Attributes:
        counts: Counts of a micro-batch without activation checkpointing (False) and with it (True),
            as the planned GPU runs it.
        global_batch_size: Number of images in a step, over all ranks.
        frozen_dtype: Data type of the teachers, as in the recipe ("auto", "float32" or "bfloat16");
            "float32" if the data types of several teachers differ.
        moments: Number of float32 values that the optimiser keeps for each parameter.
        may_split_frozen: Whether the frozen models may be sharded over ranks, as teachers may be.
        norm_group: Number of images over which batch norms take their statistics. A micro-batch has
            a multiple of this number, or all images of a rank in a step.
        phases: Measured seconds of a step's phases; None to compute times from counts and the
            GPU's rates.
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
        """Number of elements of each trained tensor, in the student and its heads."""
        return tuple(sizes(self.counts[False].student))

    @cached_property
    def teachers(self) -> tuple[tuple[int, ...], ...]:
        """Number of elements of each tensor of each teacher, in the order of the recipe."""
        return tuple(tuple(sizes(model)) for model in self.counts[False].frozen)

    @cached_property
    def teacher_sizes(self) -> tuple[int, ...]:
        """Number of elements of each tensor of all teachers; empty without a teacher."""
        return tuple(chain.from_iterable(self.teachers))

    @cached_property
    def smallest_first(self) -> tuple[int, ...]:
        """Indices of the teachers in `teachers`, from the smallest teacher to the largest."""
        totals = [sum(teacher) for teacher in self.teachers]
        return tuple(sorted(range(len(totals)), key=totals.__getitem__))

    def split_sizes(self, candidate: Candidate) -> tuple[int, ...]:
        """Returns the number of elements of each tensor of the teachers that `candidate` shards.

        The result is empty if no teacher is sharded.
        """
        if candidate.teacher == "replicated":
            return ()
        split = self.smallest_first[candidate.whole :]
        return tuple(chain.from_iterable(self.teachers[place] for place in split))

    @cached_property
    def threshold(self) -> int:
        """Largest number of elements of a tensor that stays whole on every rank at stage 3."""
        return persistence_threshold([*self.student_sizes, *self.teacher_sizes])

    @cached_property
    def parameters(self) -> int:
        """Number of trained parameters."""
        return sum(self.student_sizes)

    def accumulation(self, candidate: Candidate, machine: Machine) -> int:
        """Returns the number of micro-batches of a rank in a step, at least 1.

        `candidate` has the micro-batch size, and `machine` the number of ranks.
        """
        share = self.global_batch_size // machine.cluster.gpus
        return max(1, share // candidate.micro_batch_size)

    def counts_of(self, candidate: Candidate, machine: Machine) -> Counts:
        """Returns the counts of each micro-batch in a step with the settings `candidate`."""
        counts = self.counts[candidate.checkpointing]
        return counts.in_step_of(self.accumulation(candidate, machine))

    def compute_bytes(self, machine: Machine) -> int:
        """Returns the bytes of a parameter in the matrix products: 2 in bfloat16, 4 in float32."""
        return 2 if machine.rates.bfloat16 else 4

    def sum_bytes(self, machine: Machine) -> int:
        """Returns the bytes of a gradient's element when gradients are summed over ranks.

        The result is 2 in bfloat16, 4 in float32.
        """
        summed = sums_in_float32(machine.cluster.gpus, bfloat16=machine.rates.bfloat16)
        return 4 if summed else self.compute_bytes(machine)

    def teacher_bfloat16(self, machine: Machine) -> bool:
        """Whether the teachers are in bfloat16 in a run on `machine`."""
        return frozen_in_bfloat16(self.frozen_dtype, machine.rates.bfloat16)


def together(loads: Sequence[Workload], shared: Line = NOTHING) -> Workload:
    """Returns the workload of several students that train together on the same teachers' outputs.

    Args:
        loads: The workload of each student alone.
        shared: Bytes of a micro-batch's images and of the frozen models' outputs for these images,
            as a linear function of the number of images.
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
    """Whether a frozen model is in bfloat16.

    Args:
        dtype: The recipe's data type of the model; "auto" for the data type of the run.
        bfloat16: Whether the run computes in bfloat16.
    """
    return bfloat16 if dtype == "auto" else dtype == "bfloat16"
