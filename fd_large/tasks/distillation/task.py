"""Feature distillation as in the paper: a student learns the map of a frozen teacher.

    loss = smooth_l1(projection(student(image)), whiten(teacher(image)))

Whitening normalises each token of the teacher's map to mean 0 and variance 1. Drop path (`keep`)
acts in the student only, whose blocks share a relative position bias (backbones/). Source: Wei et
al., arXiv 2205.14141; constants as in the official code.

Features beyond the paper replace one of three seams, whose defaults are the paper's method
(`composed` in job.py chooses):

- `teachers`, the teachers' maps: (images, given maps, training) -> maps by name;
- `sight`, the student's view of an image, and the tokens that count;
- `join`, the combination of the targets' losses into one.

A target or a seam that needs sums over all images of a step has a `Part` (engine/parts.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial, reduce
from operator import add
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.statistics import IMAGENET, Statistics, normalise
from fd_large.engine.parts import Part
from fd_large.engine.task import Task
from fd_large.errors import ShapeError
from fd_large.kernels.whitened_loss import whiten
from fd_large.tasks.distillation.registered import register

Maps = Mapping[str, Any]
"""The teachers' maps by name, and any other targets that a batch holds beside its images."""
Drawn = Mapping[str, Tensor]
"""Random draws for the images of a batch, by name, each of shape (..., B)."""
UNDRAWN: Drawn = MappingProxyType({})

smooth_l1 = partial(F.smooth_l1_loss, beta=2.0)


class Seen(NamedTuple):
    """The student's map of a batch, and the maps after its blocks if a head reads them."""

    map: FeatureMap
    blocks: tuple[FeatureMap, ...] = ()


class Target:
    """A head on the student's tokens, and the loss between them and a teacher's whitened map.

    Recipes use its subclass `NamedTarget` (target.py), which also aligns grids and prefix tokens
    and may use fused kernels; without fused kernels it computes the same, to the bit.

    Args:
        head: From tokens (B, N, C) to the teacher's width, (B, N, Ct).
        teacher: The teacher's name, or "" for a single teacher.
        normalise: From the teacher's tokens (B, N, Ct) to the same in float32.
        loss: From two (B, N, Ct) to a scalar.
        weight: Weight of its loss in the loss of the task.
        label: Name in metrics; "" for a single teacher's map.
        path: Name of its head in checkpoints; no two targets have the same.
    """

    def __init__(
        self,
        head: nn.Module,
        *,
        teacher: str = "",
        normalise: Callable[[Tensor], Tensor] = whiten,
        loss: Callable[[Tensor, Tensor], Tensor] = smooth_l1,
        weight: float = 1.0,
        label: str = "",
        path: str = "projection",
    ) -> None:
        self.head, self.teacher, self.weight = head, teacher, weight
        self.label, self.path = label, path
        self.normalise, self.loss = normalise, loss

    def modules(self) -> dict[str, nn.Module]:
        """Returns its Modules by their names in checkpoints."""
        return {self.path: self.head}

    def parts(self) -> tuple[Part, ...]:
        """Returns its parts, which need sums over a whole step."""
        return ()

    def compared(self, student_maps: Seen, teacher: FeatureMap) -> tuple[Tensor, Tensor]:
        """Returns the student's projected tokens and the teacher's tokens, (B, N, Ct) each.

        Raises: ShapeError: if they are not tokens of the same places.
        """
        projected = self.head(student_maps.map.tokens)
        if projected.shape != teacher.tokens.shape:
            raise ShapeError(
                f"targets: maps of other tokens; got {tuple(projected.shape)} of the student and "
                f"{tuple(teacher.tokens.shape)} of the teacher, expected the same. Use a "
                "NamedTarget, which aligns grids and prefix tokens."
            )
        return projected, teacher.tokens

    def value(self, projected: Tensor, tokens: Tensor) -> Tensor:
        """Returns the loss between the tokens of `compared`, unweighted, a float32 scalar."""
        whitened = self.normalise(tokens.detach())
        return self.loss(projected.to(whitened.dtype), whitened)

    def per_image(self, projected: Tensor, tokens: Tensor) -> Tensor:
        """Returns the loss of each image, (B,), whose mean is `value`."""
        pairs = zip(projected.split(1), tokens.split(1), strict=True)
        return torch.stack([self.value(*pair) for pair in pairs])

    def cosine(self, projected: Tensor, tokens: Tensor) -> Tensor:
        """Returns the mean cosine of projected and normalised tokens, a scalar."""
        return F.cosine_similarity(projected.float(), self.normalise(tokens), dim=-1).mean()


class Comparison(NamedTuple):
    """Tokens of student and teacher at the same places, (B, N, Ct)."""

    target: Any
    projected: Tensor
    tokens: Tensor

    def value(self) -> Tensor:
        """Returns the loss without its weight, a scalar."""
        return self.target.value(self.projected, self.tokens)

    def per_image(self) -> Tensor:
        """Returns the loss of each image without its weight, (B,)."""
        return self.target.per_image(self.projected, self.tokens)

    def shares(self) -> Tensor:
        """Returns the weight of each image in a mean over images, (B,)."""
        return self.projected.new_ones(len(self.projected), dtype=torch.float32)


class Teachers:
    """Default of the first seam: each teacher sees the images, unless its map is given."""

    def __init__(self, by_name: Mapping[str, Callable[[Tensor], FeatureMap]]) -> None:
        self.by_name = dict(by_name)

    def __call__(self, images: Tensor, given_maps: Maps, training: bool) -> Maps:
        """Returns the teachers' maps by name, and the other entries of `given_maps`."""
        maps = {
            name: model(images) for name, model in self.by_name.items() if name not in given_maps
        }
        return {**given_maps, **maps}


class Whole:
    """Default of the second seam: the student sees the whole image, and all tokens count.

    Attributes:
        description: A line for the log, or "".
    """

    description = ""

    def draws(self, seed: int, epoch: int, positions: Tensor) -> Drawn:
        """Returns the random draws of each image; see `Task.draws`."""
        return {}

    def width(self, student: nn.Module) -> int:
        """Returns the channels of the heads' input."""
        return student.width

    def undrawn(self, images: Tensor) -> Drawn:
        """Returns placeholders of the draws in training, for counting on shapes."""
        return {}

    def see(self, student: nn.Module, pixels: Tensor, keep: Tensor | None, drawn: Drawn) -> Seen:
        """Runs the student."""
        return Seen(student(pixels, keep))

    def counted(self, comparison: Comparison, drawn: Drawn) -> Comparison:
        """Returns the comparison of the tokens that count."""
        return comparison

    def shares(self, drawn: Drawn, pixels: Tensor) -> Tensor:
        """Returns the weight of each image in a mean over images, (B,)."""
        return pixels.new_ones(len(pixels))


class Sum:
    """Default of the third seam: the weighted sum of the targets' losses."""

    def draws(self, seed: int, epoch: int, positions: Tensor) -> Drawn:
        """Returns the random draws of each image; see `Task.draws`."""
        return {}

    def __call__(self, comparisons: Sequence[Comparison], maps: Maps, drawn: Drawn) -> Tensor:
        """Returns the loss of a micro batch in training."""
        targets = [comparison.target for comparison in comparisons]
        return self.combined(targets, [comparison.value() for comparison in comparisons])

    def combined(self, targets: Sequence[Target], losses: Sequence[Any]) -> Any:
        """Returns the loss of an evaluation from the targets' losses, which are unweighted."""
        return reduce(add, (t.weight * loss for t, loss in zip(targets, losses, strict=True)))


class Distillation(Task):
    """A student, a head for each target, and their loss.

    Args:
        student: A backbone of `fd_large.backbones`.
        teachers: The first seam; or callables from uint8 images to a FeatureMap without gradient,
            by name. They are not submodules: their parameters are in no optimiser and checkpoint.
        targets: The targets, learnt from the teachers' maps.
        sight, join: The other seams. The `modules()` of seams and targets are registered under
            their names in checkpoints, and their `parts()` are parts of a step.
        statistics: The student's normalisation; the paper uses ImageNet's for every student.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Any,
        targets: Sequence[Target],
        *,
        sight: Any = None,
        join: Any = None,
        statistics: Statistics = IMAGENET,
    ) -> None:
        super().__init__(student)
        self.targets: tuple[Any, ...] = tuple(targets)
        self.statistics = statistics
        self.teachers = teachers if callable(teachers) else Teachers(teachers)
        self.sight, self.join = sight or Whole(), join or Sum()
        for filler in (*self.targets, self.sight, self.join):
            for path, module in getattr(filler, "modules", dict)().items():
                register(self, path, module)
            self.parts += getattr(filler, "parts", tuple)()

    def learnt(self, images: Tensor, given_maps: Maps | None) -> Maps:
        """Returns the teachers' maps of uint8 images (B, 3, H, W), by name."""
        with torch.no_grad():
            return self.teachers(images, given_maps or {}, self.training)

    def draws(self, seed: int, epoch: int, positions: Tensor) -> Drawn:
        """Returns the random draws of the seams."""
        return {
            name: drawn
            for filler in (self.sight, self.join)
            for name, drawn in filler.draws(seed, epoch, positions).items()
        }

    def prepare(
        self, images: Tensor, given_maps: Maps | None, keep: Tensor | None, draws: Drawn = UNDRAWN
    ) -> dict[str, Any]:
        """Returns the student's pixels, its drop path, and the teachers' maps."""
        maps = self.learnt(images, given_maps)
        with torch.no_grad():
            pixels = normalise(images, self.statistics)
        if self.training and not draws:
            draws = self.sight.undrawn(images)
        return {"pixels": pixels, "keep": keep, "maps": maps, "drawn": draws}

    def forward(
        self, *, pixels: Tensor, keep: Tensor | None, maps: Maps, drawn: Drawn = UNDRAWN
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and, in evaluation, the cosine similarity to each target.

        Args:
            pixels: (B, 3, H, W) float32, normalised for the student.
            keep: (num_sites, B) bool, or None for no drop path.
            maps: The teachers' maps by name, any floating-point dtype.
            drawn: Result of `draws`, on the device.
        """
        dtype = next(self.student.parameters()).dtype
        student_maps = self.sight.see(self.student, pixels.to(dtype), keep, drawn)
        # The residual stream may have another data type than the heads.
        student_maps = Seen(
            _in_type(student_maps.map, dtype),
            tuple(_in_type(map_, dtype) for map_ in student_maps.blocks),
        )
        comparisons = [
            self.sight.counted(Comparison(t, *t.compared(student_maps, maps[t.teacher])), drawn)
            for t in self.targets
        ]
        if self.training:
            return self.join(comparisons, maps, drawn), {}
        return self._measured(comparisons)

    def _measured(self, comparisons: Sequence[Comparison]) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss of an evaluation, the mean cosine, and both for each labelled target."""
        losses = [comparison.value() for comparison in comparisons]
        cosines = [c.target.cosine(c.projected, c.tokens) for c in comparisons]
        metrics: dict[str, Tensor] = {}
        for target, loss, cosine in zip(self.targets, losses, cosines, strict=True):
            if target.label:
                metrics[f"{target.label}_loss"] = loss.detach()
                metrics[f"{target.label}_cosine"] = cosine
        metrics["cosine"] = torch.stack(cosines).mean()
        return self.join.combined(self.targets, losses), metrics

    def models(self) -> dict[str, nn.Module]:
        """Returns the teachers and this task; the teachers first, as they run first."""
        models: dict[str, nn.Module] = {}
        for name, teacher in self.teachers.by_name.items():
            model = getattr(teacher, "module", teacher)
            if isinstance(model, nn.Module):
                models[f"teachers.{name}." if name else "teacher."] = model
        return {**models, "": self}


def _in_type(map_: FeatureMap, dtype: torch.dtype) -> FeatureMap:
    summary = None if map_.summary is None else map_.summary.to(dtype)
    return map_._replace(tokens=map_.tokens.to(dtype), summary=summary)
