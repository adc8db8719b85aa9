"""Counts of a task's step as data, for any micro-batch: products, bytes, calls, memory.

`engine/counting/count.py` counts the real task at two sizes. Every count is linear in the images of
a micro-batch, except the peak of memory, which is the maximum of several such lines.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any, Literal, NamedTuple

Phase = Literal["inference", "first_pass", "forward", "backward"]
"""The forwards of frozen models; the first pass of a step in two passes, for its sums
(`Task.sums`); the forward of the trained models; their backward, with its recomputation."""
_BY_PHASE = ("moved", "calls", "modules", "blocks")


class Line(NamedTuple):
    """A linear function of the number of images: `fixed` + `each` per image."""

    fixed: float
    each: float

    def at(self, images: int) -> int:
        """Returns the value for a micro-batch."""
        return int(self.fixed + self.each * images)

    def __add__(self, other: Line) -> Line:  # type: ignore[override]
        return Line(self.fixed + other.fixed, self.each + other.each)

    def scaled(self, factor: float) -> Line:
        """Returns the line times a factor."""
        return Line(factor * self.fixed, factor * self.each)


NOTHING = Line(0, 0)


class Product(NamedTuple):
    """A group of equal operations with matrix products.

    Attributes:
        phase: Phase in which they run.
        again: Whether they recompute forward's results.
        times: Number of such calls; a mean over image sizes may be no whole number.
        flops: FLOPs of one operation.
        moved: Bytes read and written by one operation.
    """

    phase: str
    again: bool
    times: float
    flops: Line
    moved: Line


class StepFlops(NamedTuple):
    """FLOPs of one micro-batch on one rank.

    Attributes:
        model: Required FLOPs, the numerator of MFU: forward and backward of the trained model,
            forward of frozen models.
        hardware: Executed FLOPs, including recomputation and a first pass for sums.
        frozen: FLOPs of the frozen models, which `model` and `hardware` include and which several
            students share.
    """

    model: float
    hardware: float
    frozen: float = 0

    def shared_by(self, students: int) -> StepFlops:
        """Returns the FLOPs of one of several students, with its share of the frozen models."""
        of_others = self.frozen * (1 - 1 / students)
        frozen_share = self.frozen - of_others
        return StepFlops(self.model - of_others, self.hardware - of_others, frozen_share)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Counts of a task's micro-batch, as one kind of device runs it.

    Attributes:
        products: Operations with matrix products, equal ones together.
        again: FLOPs of recomputation inside products that are not marked so: attention's logits
            inside a fused backward.
        moved: Bytes read and written by all other operations, by phase.
        calls: Calls that Python makes, views included, by phase.
        modules: Number of forwards of modules, by phase, without `blocks` and the modules in them.
        blocks: Number of forwards of blocks that stage 3 gathers at once, by phase.
        kept: Bytes that live between forward and backward, the batch among them.
        peak: Peak bytes without gradients of parameters: the maximum of these lines.
        student: (elements, number of tensors) of the trained tensors.
        frozen: (elements, number of tensors) of each frozen model.
        held: Bytes that are held of a micro-batch until its turn, in a step in two passes.
        images: The only micro-batch for which the counts are valid; 0 means all.
        fused: Whether fused kernels run.
    """

    products: tuple[Product, ...]
    again: Line
    moved: Mapping[str, Line]
    calls: Mapping[str, float]
    modules: Mapping[str, float]
    kept: Line
    peak: tuple[Line, ...]
    student: tuple[tuple[int, int], ...]
    frozen: tuple[tuple[tuple[int, int], ...], ...] = ()
    held: Line = NOTHING
    images: int = 0
    fused: bool = False
    blocks: Mapping[str, float] = field(default_factory=dict)

    def in_step_of(self, micro_batches: int) -> Counts:
        """Returns the counts of each micro-batch of a step with this number of micro-batches.

        With a single micro-batch, sums before the step need no forward of the student, and are
        left out.
        """
        if micro_batches > 1:
            return self
        return replace(self.without("first_pass"), held=NOTHING)

    def without(self, phase: Phase) -> Counts:
        """Returns the counts of a step without a phase, such as a stored teacher's forward."""
        return replace(
            self,
            products=tuple(p for p in self.products if p.phase != phase),
            **{
                name: {key: n for key, n in getattr(self, name).items() if key != phase}
                for name in _BY_PHASE
            },
        )

    def flops(self, phase: Phase, images: int) -> int:
        """Returns the FLOPs of a phase, without recomputation."""
        products = [p for p in self.products if p.phase == phase and not p.again]
        total = round(sum(p.times * p.flops.at(images) for p in products))
        return total - (self.again.at(images) if phase == "backward" else 0)

    def flops_per_image(self, phase: Phase) -> float:
        """Returns the FLOPs of a phase for one image, without recomputation."""
        images = self.images or 1
        return self.flops(phase, images) / images

    def step_flops(self, images: int) -> StepFlops:
        """Returns the FLOPs of a micro-batch."""
        return StepFlops(
            model=sum(self.flops(phase, images) for phase in ("inference", "forward", "backward")),
            hardware=round(sum(p.times * p.flops.at(images) for p in self.products)),
            frozen=self.flops("inference", images),
        )

    def peak_at(self, images: int) -> int:
        """Returns the peak of live bytes, besides parameters and their gradients."""
        return max(line.at(images) for line in self.peak)

    def to_plain(self) -> dict[str, Any]:
        """Returns the fields in a JSON-safe form."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Counts:
        """Returns the counts from the result of `to_plain`."""
        return cls(
            products=tuple(
                Product(phase, again, times, Line(*flops), Line(*moved))
                for phase, again, times, flops, moved in plain["products"]
            ),
            again=Line(*plain["again"]),
            moved={phase: Line(*line) for phase, line in plain["moved"].items()},
            calls=plain["calls"],
            modules=plain["modules"],
            kept=Line(*plain["kept"]),
            peak=tuple(Line(*line) for line in plain["peak"]),
            student=tuple((size, count) for size, count in plain["student"]),
            frozen=tuple(
                tuple((size, count) for size, count in model) for model in plain["frozen"]
            ),
            held=Line(*plain.get("held", NOTHING)),  # Files of older versions do not have it.
            images=plain["images"],
            fused=plain["fused"],
            blocks=plain.get("blocks", {}),
        )


def of_students(each: Sequence[Counts], shared: Line = NOTHING) -> Counts:
    """Returns the counts of several students that train in step on one pass of the frozen models.

    One student computes at a time: their work adds up, and the largest live memory counts.

    Args:
        each: The counts of each student alone, with the same frozen models.
        shared: Bytes of a micro-batch's images and of the frozen models' outputs for them, which
            stay until the last student has taken the step. Copies held by a step in two passes
            are counted in addition.
    """
    first, *others = each
    # The forward of the frozen models is made once for all students.
    counted = [first, *(counts.without("inference") for counts in others)]
    by_phase = {name: _added([getattr(counts, name) for counts in counted]) for name in _BY_PHASE}
    return replace(
        first,
        products=tuple(product for counts in counted for product in counts.products),
        again=reduce(add, [counts.again for counts in each]),
        kept=max((counts.kept for counts in each), key=lambda line: line.each),
        peak=highest([line for counts in each for line in counts.peak]),
        student=tuple(tensors for counts in each for tensors in counts.student),
        held=max((counts.held for counts in each), key=lambda line: line.each) + shared,
        **by_phase,
    )


def of_sizes(each: Sequence[Counts]) -> Counts:
    """Returns the counts of a run whose steps have images of several sizes, equally often.

    FLOPs, moved bytes and calls are means over the sizes; live memory is the largest.

    Args:
        each: The counts at each size; the last has the largest images.
    """
    if len(each) == 1:
        return each[0]
    share = 1 / len(each)
    by_phase = {
        name: {
            phase: total.scaled(share) if isinstance(total, Line) else share * total
            for phase, total in _added([getattr(counts, name) for counts in each]).items()
        }
        for name in _BY_PHASE
    }
    return replace(
        each[-1],
        products=tuple(
            product._replace(times=share * product.times)
            for counts in each
            for product in counts.products
        ),
        again=reduce(add, [counts.again for counts in each]).scaled(share),
        peak=highest([line for counts in each for line in counts.peak]),
        **by_phase,
    )


def _added(each: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Adds numbers or lines by phase."""
    phases = dict.fromkeys(phase for terms in each for phase in terms)
    return {
        phase: reduce(add, [terms[phase] for terms in each if phase in terms]) for phase in phases
    }


def sizes(tensors: Iterable[tuple[int, int]]) -> list[int]:
    """Returns the elements of each tensor, from (elements, number of tensors)."""
    return [size for size, count in tensors for _ in range(count)]


def grouped(tensors: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Returns (elements, number of tensors) from the elements of each tensor."""
    return tuple(sorted(Counter(tensors).items()))


def through(first: int, second: int, at: tuple[int, int]) -> Line:
    """Returns the line through two numbers, counted at two micro-batches."""
    each = (second - first) / (at[1] - at[0])
    if each == int(each):
        each = int(each)
    return Line(first - each * at[0], each)


def highest(lines: Sequence[Line]) -> tuple[Line, ...]:
    """Returns the lines that are the maximum at some micro-batch of one image or more."""
    best: dict[float, float] = {}
    for fixed, each in lines:
        best[each] = max(fixed, best.get(each, fixed))
    hull: list[Line] = []
    for each, fixed in sorted(best.items()):
        line = Line(fixed, each)
        while hull and hull[-1].fixed + hull[-1].each <= fixed + each:
            hull.pop()  # This line is lower at one image already, and rises less.
        while len(hull) > 1 and _meet(hull[-2], line) <= _meet(hull[-2], hull[-1]):
            hull.pop()
        hull.append(line)
    return tuple(hull)


def _meet(a: Line, b: Line) -> float:
    """Returns the number of images at which the steeper line b reaches a."""
    return (a.fixed - b.fixed) / (b.each - a.each)
