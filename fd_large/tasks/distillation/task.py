"""Feature distillation as in the paper: a student learns the map of a frozen teacher.

    loss = smooth_l1(projection(student(image)), whiten(teacher(image)))

Whitening normalises each token of the teacher's map to mean 0 and variance 1. Drop path (`keep`)
acts in the student only, whose blocks share a relative position bias (backbones/). Source: Wei et
al., arXiv 2205.14141; constants as in the official code.

Features beyond the paper replace one of three components, whose defaults are the paper's method
(`composed` in job.py chooses the components):

- `teachers` computes the teachers' maps: (images, given maps, training) -> maps by name;
- `sight` decides what the student sees of an image, and which tokens count in the loss;
- `join` combines the targets' losses into a single loss.

A target or a component that needs sums over all images of a step has a `Part` (engine/parts.py).
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
"""Random numbers for the images of a batch, by name; each tensor has the shape (..., B)."""
UNDRAWN: Drawn = MappingProxyType({})

smooth_l1 = partial(F.smooth_l1_loss, beta=2.0)


class Seen(NamedTuple):
    """The student's outputs for a batch.

    Attributes:
        map: The last feature map.
        blocks: The feature maps after each block; empty unless a head reads them.
    """

    map: FeatureMap
    blocks: tuple[FeatureMap, ...] = ()


class Target:
    """A head on the student's tokens, and the loss of its output against a teacher's whitened map.

    Recipes use the subclass `NamedTarget` (target.py), which also aligns grids and prefix tokens
    and may use fused kernels. If the grids are equal and no kernel is fused, the subclass computes
    the same values to the bit.

    Args:
        head: Maps the student's tokens (B, N, C) to the teacher's width, (B, N, Ct).
        teacher: The teacher's name, or "" for a single teacher.
        normalise: Maps the teacher's tokens (B, N, Ct) to normalised tokens of the same shape in
            float32.
        loss: Maps projected and normalised tokens, (B, N, Ct) each, to a scalar.
        weight: Weight of the target's loss in the loss of the task.
        label: The target's name in metrics; "" for a single teacher's map.
        path: The head's name in checkpoints, which must differ from that of all other targets.
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
        """Returns {name in checkpoints: Module} of the target, here of the head alone."""
        return {self.path: self.head}

    def parts(self) -> tuple[Part, ...]:
        """Returns the target's parts of a step, here none.

        A part needs sums over all images of a step.
        """
        return ()

    def compared(self, student_maps: Seen, teacher: FeatureMap) -> tuple[Tensor, Tensor]:
        """Returns the student's tokens after the head, and the teacher's tokens, (B, N, Ct) each.

        Args:
            student_maps: The student's maps.
            teacher: The teacher's map.

        Raises: ShapeError: if the shapes of the two tensors differ.
        """
        projected = self.head(student_maps.map.tokens)
        if projected.shape != teacher.tokens.shape:
            raise ShapeError(
                f"targets: the maps differ in shape; got {tuple(projected.shape)} of the student "
                f"and {tuple(teacher.tokens.shape)} of the teacher, expected equal shapes. Use a "
                "NamedTarget, which aligns grids and prefix tokens."
            )
        return projected, teacher.tokens

    def value(self, projected: Tensor, tokens: Tensor) -> Tensor:
        """Returns the unweighted loss, a float32 scalar.

        Args:
            projected: (B, N, Ct), the student's tokens after the head.
            tokens: (B, N, Ct), the teacher's tokens before the normaliser.
        """
        whitened = self.normalise(tokens.detach())
        return self.loss(projected.to(whitened.dtype), whitened)

    def per_image(self, projected: Tensor, tokens: Tensor) -> Tensor:
        """Returns the unweighted loss of each image, (B,) float32.

        The mean over images is the result of `value`.

        Args:
            projected: (B, N, Ct), the student's tokens after the head.
            tokens: (B, N, Ct), the teacher's tokens before the normaliser.
        """
        pairs = zip(projected.split(1), tokens.split(1), strict=True)
        return torch.stack([self.value(*pair) for pair in pairs])

    def cosine(self, projected: Tensor, tokens: Tensor) -> Tensor:
        """Returns the mean over tokens of the cosine between student and teacher, a scalar.

        Args:
            projected: (B, N, Ct), the student's tokens after the head.
            tokens: (B, N, Ct), the teacher's tokens before the normaliser.
        """
        return F.cosine_similarity(projected.float(), self.normalise(tokens), dim=-1).mean()


class Comparison(NamedTuple):
    """Tokens of student and teacher at the same positions of the images, for one target.

    Attributes:
        target: The target.
        projected: (B, N, Ct), the student's tokens after the target's head.
        tokens: (B, N, Ct), the teacher's tokens before the normaliser.
    """

    target: Any
    projected: Tensor
    tokens: Tensor

    def value(self) -> Tensor:
        """Returns the target's unweighted loss, a scalar."""
        return self.target.value(self.projected, self.tokens)

    def per_image(self) -> Tensor:
        """Returns the target's unweighted loss of each image, (B,)."""
        return self.target.per_image(self.projected, self.tokens)

    def shares(self) -> Tensor:
        """Returns the weight of each image in a mean over images, (B,) float32: ones."""
        return self.projected.new_ones(len(self.projected), dtype=torch.float32)


class Teachers:
    """Computes the teachers' maps; the default of `Distillation.teachers`.

    Each teacher runs on the images, unless the teacher's map is given.

    Args:
        by_name: The teachers by name; each maps uint8 images (B, 3, H, W) to a FeatureMap.
    """

    def __init__(self, by_name: Mapping[str, Callable[[Tensor], FeatureMap]]) -> None:
        self.by_name = dict(by_name)

    def __call__(self, images: Tensor, given_maps: Maps, training: bool) -> Maps:
        """Returns `given_maps`, and by name the maps of teachers that `given_maps` does not have.

        Args:
            images: (B, 3, H, W) uint8.
            given_maps: Maps by the teacher's name, and other targets of the batch.
            training: Whether the task is in training mode; `Teachers` does not use it.
        """
        maps = {
            name: model(images) for name, model in self.by_name.items() if name not in given_maps
        }
        return {**given_maps, **maps}


class Whole:
    """Runs the student on whole images, of which all tokens count in the loss.

    This is the default of `Distillation.sight`.

    Attributes:
        description: A line for the log, or "" to log nothing.
    """

    description = ""

    def draws(self, seed: int, epoch: int, positions: Tensor) -> Drawn:
        """Returns an empty dictionary, since whole images need no random numbers.

        For the arguments see `Task.draws`.
        """
        return {}

    def width(self, student: nn.Module) -> int:
        """Returns the number of channels of the heads' input, here the width of `student`."""
        return student.width

    def undrawn(self, images: Tensor) -> Drawn:
        """Returns an empty dictionary, the placeholder for the result of `draws`.

        A placeholder stands for the random numbers if a step runs only to count its operations.

        Args:
            images: Not used.
        """
        return {}

    def see(self, student: nn.Module, pixels: Tensor, keep: Tensor | None, drawn: Drawn) -> Seen:
        """Runs the student on whole images, and returns the student's maps.

        Args:
            student: The student.
            pixels: (B, 3, H, W), normalised.
            keep: (num_sites, B) bool, or None for no drop path.
            drawn: Not used.
        """
        return Seen(student(pixels, keep))

    def counted(self, comparison: Comparison, drawn: Drawn) -> Comparison:
        """Returns `comparison` unchanged, since all tokens count in the loss.

        Args:
            comparison: The tokens of student and teacher for one target.
            drawn: Not used.
        """
        return comparison

    def shares(self, drawn: Drawn, pixels: Tensor) -> Tensor:
        """Returns the weight of each image in a mean over images, here ones, (B,).

        Args:
            drawn: Not used.
            pixels: (B, 3, H, W).
        """
        return pixels.new_ones(len(pixels))


class Sum:
    """Combines the targets' losses into their weighted sum; the default of `Distillation.join`."""

    def draws(self, seed: int, epoch: int, positions: Tensor) -> Drawn:
        """Returns an empty dictionary, since the sum needs no random numbers.

        For the arguments see `Task.draws`.
        """
        return {}

    def __call__(self, comparisons: Sequence[Comparison], maps: Maps, drawn: Drawn) -> Tensor:
        """Returns the weighted sum of the targets' losses on a micro-batch, a scalar.

        Args:
            comparisons: The comparison of student and teacher for each target.
            maps: Not used.
            drawn: Not used.
        """
        targets = [comparison.target for comparison in comparisons]
        return self.combined(targets, [comparison.value() for comparison in comparisons])

    def combined(self, targets: Sequence[Target], losses: Sequence[Any]) -> Any:
        """Returns the weighted sum of the targets' losses, a scalar.

        Args:
            targets: The targets.
            losses: The unweighted loss of each target.
        """
        return reduce(add, (t.weight * loss for t, loss in zip(targets, losses, strict=True)))


class Distillation(Task):
    """The task of distillation: a student, a head for each target, and the loss.

    The method `modules()` of a target, of `sight` and of `join` returns {name: module}. The task
    registers each module as a submodule under this name, which the module also has in checkpoints.
    The method `parts()` of a target, of `sight` and of `join` returns parts of a step, which become
    parts of the task.

    Args:
        student: A backbone of `fd_large.backbones`.
        teachers: A callable that computes all maps, as `Teachers`; or a mapping from a teacher's
            name to a callable from uint8 images to a FeatureMap without gradient. Teachers are not
            submodules, so that no optimiser and no checkpoint has their parameters.
        targets: What the student learns: for each target a teacher's map or summary, a head and a
            loss.
        sight: The object that runs the student and decides which tokens count in the loss, as
            `Whole`; None for `Whole`.
        join: The object that combines the targets' losses, as `Sum`; None for `Sum`.
        statistics: Mean and deviation that normalise the student's pixels; the paper uses the
            statistics of ImageNet for every student.
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
        """Returns the teachers' maps of uint8 images (B, 3, H, W), by name.

        Args:
            images: The images.
            given_maps: Maps by the teacher's name, and other targets of the batch, all of which are
                returned unchanged. A teacher whose map is given does not run.
        """
        with torch.no_grad():
            return self.teachers(images, given_maps or {}, self.training)

    def draws(self, seed: int, epoch: int, positions: Tensor) -> Drawn:
        """Returns the random numbers that `sight` and `join` need for each image, by name.

        For the arguments see `Task.draws`.
        """
        return {
            name: drawn
            for filler in (self.sight, self.join)
            for name, drawn in filler.draws(seed, epoch, positions).items()
        }

    def prepare(
        self, images: Tensor, given_maps: Maps | None, keep: Tensor | None, draws: Drawn = UNDRAWN
    ) -> dict[str, Any]:
        """Returns the arguments of `forward` by name.

        Args:
            images: (B, 3, H, W) uint8.
            given_maps: See `learnt`.
            keep: (num_sites, B) bool, or None for no drop path.
            draws: The result of `draws`; empty to train without random numbers.
        """
        maps = self.learnt(images, given_maps)
        with torch.no_grad():
            pixels = normalise(images, self.statistics)
        if self.training and not draws:
            draws = self.sight.undrawn(images)
        return {"pixels": pixels, "keep": keep, "maps": maps, "drawn": draws}

    def forward(
        self, *, pixels: Tensor, keep: Tensor | None, maps: Maps, drawn: Drawn = UNDRAWN
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss, a scalar, and metrics by name, which are empty in training.

        The metrics are the mean cosine similarity to the targets, and the loss and the cosine
        similarity of each target with a label.

        Args:
            pixels: (B, 3, H, W) float32, normalised for the student.
            keep: (num_sites, B) bool, or None for no drop path.
            maps: The teachers' maps by name, of any floating-point dtype.
            drawn: The result of `draws`, on the device.
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
        """Returns the loss of an evaluation, a scalar, and the metrics that `forward` describes.

        Args:
            comparisons: The comparison of student and teacher for each target.
        """
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
        """Returns {prefix of the names of a model's layers: model}.

        The teachers have the prefixes "teacher." or "teachers.NAME."; the task, which comes last,
        has the prefix "".
        """
        models: dict[str, nn.Module] = {}
        for name, teacher in self.teachers.by_name.items():
            model = getattr(teacher, "module", teacher)
            if isinstance(model, nn.Module):
                models[f"teachers.{name}." if name else "teacher."] = model
        return {**models, "": self}


def _in_type(map_: FeatureMap, dtype: torch.dtype) -> FeatureMap:
    """Returns `map_` with its tokens and, if there is one, its summary converted to `dtype`."""
    summary = None if map_.summary is None else map_.summary.to(dtype)
    return map_._replace(tokens=map_.tokens.to(dtype), summary=summary)
