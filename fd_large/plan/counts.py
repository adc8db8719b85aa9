"""Counts of the operations and memory of a task's step, as functions of the micro-batch size.

`engine/counting/count.py` counts the real task at two micro-batch sizes. Every count is a linear
function of the number of images in a micro-batch, except the peak memory, which is the maximum of
several linear functions.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import reduce
from operator import add
from typing import Any, Literal, NamedTuple

Phase = Literal["inference", "first_pass", "forward", "backward"]
"""Part of a step. "inference" is the forward of frozen models. "first_pass" is the first pass of a
step in two passes, which computes sums (`Task.sums`). "forward" is the forward of the trained
models, and "backward" their backward with its recomputation."""
_BY_PHASE = ("moved", "calls", "modules", "blocks")


class Line(NamedTuple):
    """A linear function of the number of images in a micro-batch.

    Attributes:
        fixed: Value for no images.
        each: Increase for each image.
    """

    fixed: float
    each: float

    def at(self, images: int) -> int:
        """Returns the value for a micro-batch of `images` images, rounded toward 0."""
        return int(self.fixed + self.each * images)

    def __add__(self, other: Line) -> Line:  # type: ignore[override]
        return Line(self.fixed + other.fixed, self.each + other.each)

    def scaled(self, factor: float) -> Line:
        """Returns the linear function multiplied by `factor`."""
        return Line(factor * self.fixed, factor * self.each)


NOTHING = Line(0, 0)


class Product(NamedTuple):
    """A group of equal operations with matrix products.

    Attributes:
        phase: Part of the step in which the operations run.
        again: Whether the operations recompute results of the forward pass.
        times: Number of the operations, which need not be whole, since it may be a mean over
            several image sizes.
        flops: FLOPs of one operation.
        moved: Bytes that one operation reads and writes.
    """

    phase: str
    again: bool
    times: float
    flops: Line
    moved: Line


class StepFlops(NamedTuple):
    """FLOPs of one micro-batch on one rank.

    Attributes:
        model: FLOPs that the step requires, which are the numerator of MFU: the forward and
            backward of the trained models and the forward of frozen models.
        hardware: FLOPs that are executed, which include recomputation and the first pass of a step
            in two passes.
        frozen: FLOPs of the frozen models, which `model` and `hardware` include and which several
            students share.
    """

    model: float
    hardware: float
    frozen: float = 0

    def shared_by(self, students: int) -> StepFlops:
        """Returns the FLOPs of one student of several that train on the same frozen models.

        The result has the student's own FLOPs and an equal part of the frozen models' FLOPs.

        Args:
            students: Number of students.
        """
        of_others = self.frozen * (1 - 1 / students)
        frozen_share = self.frozen - of_others
        return StepFlops(self.model - of_others, self.hardware - of_others, frozen_share)


@dataclass(frozen=True, kw_only=True)
class Counts:
    """Operations and memory of a task's micro-batch, as one kind of device runs it.

    Attributes:
        products: Operations with matrix products, in groups of equal operations.
        again: FLOPs of the recomputation of attention's logits in a fused backward. These FLOPs are
            a part of `products` that `Product.again` does not mark as recomputation.
        moved: Bytes that all other operations read and write, by phase.
        calls: Number of tensor operations that Python starts, views included, by phase.
        modules: Number of forwards of modules, by phase, without `blocks` and the modules in them.
        blocks: Number of forwards of blocks that stage 3 gathers at once, by phase.
        kept: Bytes that are kept between forward and backward, including the batch.
        peak: Linear functions whose maximum is the peak memory in bytes, without parameters and
            their gradients.
        student: (elements of a tensor, number of such tensors) of the trained tensors.
        frozen: (elements of a tensor, number of such tensors) of each frozen model.
        held: Bytes that are kept of each micro-batch until its second pass, in a step in two
            passes.
        images: The only micro-batch size for which the counts are valid; 0 if they are valid for
            all.
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
        """Returns the counts of each micro-batch in a step with `micro_batches` micro-batches.

        A step with a single micro-batch needs no first pass, which is then left out.
        """
        if micro_batches > 1:
            return self
        return replace(self.without("first_pass"), held=NOTHING)

    def without(self, phase: Phase) -> Counts:
        """Returns the counts with `phase` left out.

        For example, "inference" is left out if teachers' maps are stored.
        """
        return replace(
            self,
            products=tuple(p for p in self.products if p.phase != phase),
            **{
                name: {key: n for key, n in getattr(self, name).items() if key != phase}
                for name in _BY_PHASE
            },
        )

    def flops(self, phase: Phase, images: int) -> int:
        """Returns the FLOPs of the phase `phase` for `images` images, without recomputation."""
        products = [p for p in self.products if p.phase == phase and not p.again]
        total = round(sum(p.times * p.flops.at(images) for p in products))
        return total - (self.again.at(images) if phase == "backward" else 0)

    def flops_per_image(self, phase: Phase) -> float:
        """Returns the FLOPs of the phase `phase` for one image, without recomputation."""
        images = self.images or 1
        return self.flops(phase, images) / images

    def step_flops(self, images: int) -> StepFlops:
        """Returns the FLOPs of a micro-batch of `images` images."""
        return StepFlops(
            model=sum(self.flops(phase, images) for phase in ("inference", "forward", "backward")),
            hardware=round(sum(p.times * p.flops.at(images) for p in self.products)),
            frozen=self.flops("inference", images),
        )

    def peak_at(self, images: int) -> int:
        """Returns the peak memory of a micro-batch of `images` images, in bytes.

        Parameters and their gradients are not included.
        """
        return max(line.at(images) for line in self.peak)

    def to_plain(self) -> dict[str, Any]:
        """Returns the fields as a dict that `json.dumps` accepts, for `from_plain`."""
        return {name: getattr(self, name) for name in self.__dataclass_fields__}

    @classmethod
    def from_plain(cls, plain: Mapping[str, Any]) -> Counts:
        """Returns the counts from a dict that `to_plain` returned.

        Args:
            plain: The dict, after it was stored as JSON and loaded.
        """
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
    """Returns the counts of several students that train together on the same teachers' outputs.

    One student computes at a time, so that operations add up, and the peak memory is that of the
    student with the largest peak.

    Args:
        each: The counts of each student alone, with the same frozen models.
        shared: Bytes of a micro-batch's images and of the frozen models' outputs for these images,
            which are kept until the last student has used them. These bytes are added to what a
            step in two passes keeps (`held`).
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
    """Returns the counts of a run with several image sizes, which occur equally often.

    FLOPs, moved bytes and calls are means over the sizes. The peak memory is the largest peak of
    all sizes, and other memory is taken from the counts at the largest image size.

    Args:
        each: The counts at each image size, of which the last is the largest.
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
    """Adds up the numbers or linear functions of several dicts, by phase.

    A phase that a dict lacks counts as zero there.
    """
    phases = dict.fromkeys(phase for terms in each for phase in terms)
    return {
        phase: reduce(add, [terms[phase] for terms in each if phase in terms]) for phase in phases
    }


def sizes(tensors: Iterable[tuple[int, int]]) -> list[int]:
    """Returns the number of elements of each tensor.

    `tensors` has pairs (elements of a tensor, number of such tensors).
    """
    return [size for size, count in tensors for _ in range(count)]


def grouped(tensors: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Returns sorted pairs (elements of a tensor, number of such tensors).

    `tensors` has the number of elements of each tensor.
    """
    return tuple(sorted(Counter(tensors).items()))


def through(first: int, second: int, at: tuple[int, int]) -> Line:
    """Returns the linear function with given values at two micro-batch sizes.

    Args:
        first: Value at the first size.
        second: Value at the second size.
        at: The two micro-batch sizes.
    """
    each = (second - first) / (at[1] - at[0])
    if each == int(each):
        each = int(each)
    return Line(first - each * at[0], each)


def highest(lines: Sequence[Line]) -> tuple[Line, ...]:
    """Returns those of `lines` that are the largest for some micro-batch of one image or more.

    The other linear functions do not affect the maximum.
    """
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
    """Returns the number of images at which `a` and `b` have the same value.

    `b.each` must be larger than `a.each`.
    """
    return (a.fixed - b.fixed) / (b.each - a.each)
