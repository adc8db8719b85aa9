"""Feature distillation as a task: what a student learns of one or of several frozen teachers.

The loss is a sum over targets (target.py), by weight. By default there is one: smooth L1 between
the linear projection of the student's map and the whitened map of a teacher. Source: Wei et al.,
arXiv 2205.14141; constants as in the official code.

Two things may depend on all images of a step, which then has two passes (`Task.two_passes`): the
statistics that targets are normalised by (running_statistics.py), and which teachers each image
learns from (weighting.py). Neither needs the student in the first pass.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from functools import reduce
from operator import add
from typing import Any

import torch
from torch import Tensor, nn

from fd_large import distributed
from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.statistics import IMAGENET, Statistics, normalise
from fd_large.engine.own_stream import beside
from fd_large.engine.task import Task
from fd_large.errors import ConfigError
from fd_large.tasks.distillation.heads.map_head import BesideLoss, with_blocks
from fd_large.tasks.distillation.running_statistics import (
    Moments,
    RunningStatistics,
    momentum_at,
)
from fd_large.tasks.distillation.section import FIXED, MAP, Weighting
from fd_large.tasks.distillation.target import Target
from fd_large.tasks.distillation.weighting import (
    coins,
    kept_beside_worst,
    kept_of_own_data,
    weighted_loss,
)

Teachers = Mapping[str, Callable[..., FeatureMap]]
DATASETS = ".datasets"
"""The key, which no teacher has, of the images' datasets among the targets of a batch."""


class Distillation(Task):
    """A student, a head for each target, and the sum of the losses.

    The head of an only teacher's map is `projection`; those of several teachers are
    `heads.NAME.KIND`. Running statistics are `running.LABEL`, that of an only teacher's map
    `running.map`.

    Args:
        student: A backbone of `fd_large.backbones`.
        teachers: Callables that map uint8 images to a FeatureMap without gradient, by name; "" is
            the name of an only one. They are not submodules, so that their parameters are in no
            optimiser and no checkpoint.
        targets: What is learnt of them.
        statistics: The student's normalisation; the paper uses ImageNet's for every student.
        weighting: Which of several teachers each image learns from.
        teaches: For own_data, (teachers in the order of their names, datasets): whether a teacher
            teaches the images of a dataset.
        mosaics: Names of teachers that see several images at once (mosaic.py). In evaluation they
            see each alone, so that a figure does not depend on which images meet.
        teachers_beside: Whether the teachers compute on a CUDA stream of their own, beside the
            student's forward, in training.

    Attributes:
        targets: As given.
    """

    def __init__(
        self,
        student: nn.Module,
        teachers: Teachers,
        targets: Sequence[Target],
        *,
        statistics: Statistics = IMAGENET,
        weighting: Weighting = FIXED,
        teaches: Sequence[Sequence[bool]] = (),
        mosaics: Collection[str] = (),
        teachers_beside: bool = False,
    ) -> None:
        super().__init__(student)
        self._teachers_beside = teachers_beside
        self.targets, self.statistics = tuple(targets), statistics
        self._mosaics = frozenset(mosaics)
        self._weighting = weighting
        table = torch.zeros(len(teaches), len(teaches[0]) if teaches else 0, dtype=torch.bool)
        for row, own in enumerate(teaches):
            for column, is_own in enumerate(own):
                table[row, column] = is_own
        # A buffer, so that it is on the device.
        self.register_buffer("_teaches", table, persistent=False)
        # In a plain dict, so that nn.Module does not register teachers that are Modules.
        self._teachers = dict(teachers)
        for target in self.targets:
            self.put_head(target, target.head)
        running = {t.label or MAP: t.running for t in self.targets if t.running is not None}
        if running:
            self.running = nn.ModuleDict(running)
        queues = {t.label: t.queue for t in self.targets if t.queue is not None}
        if queues:
            self.queues = nn.ModuleDict(queues)
        self._queues = tuple(queues.values())
        # By the targets' labels: statistics of all images of this step, and sums over the images of
        # this rank that its forwards have seen.
        self._agreed: dict[str, Moments] = {}
        self._noted: dict[str, Tensor] = {}
        self._momentum = 0.0

    def put_head(self, target: Target, head: nn.Module) -> None:
        """Registers the head of a target under the name that checkpoints have."""
        target.head = head
        if not target.label:
            self.projection = head
            return
        if not hasattr(self, "heads"):
            self.heads = nn.ModuleDict()
        if target.teacher not in self.heads:
            if hasattr(self.heads, target.teacher):  # Such as "train" or "keys".
                raise ConfigError(
                    f"teachers.{target.teacher}: not a name for a teacher; got what torch's "
                    "modules call a method of theirs, expected a name that says which teacher it "
                    "is. Choose another one."
                )
            self.heads[target.teacher] = nn.ModuleDict()
        self.heads[target.teacher][target.kind] = head

    def learnt(self, images: Tensor, targets: Any) -> Mapping[str, Any]:
        """Returns the teachers' maps of the images by name, beside what the targets hold.

        The teachers run one after another: of a sharded one a layer is gathered at a time.

        Args:
            images: (B, 3, H, W) uint8.
            targets: None, or by the teacher's name its map, or what is stored of it, or is to be
                (see `CachedTeacher` and `Recorder`), and under `DATASETS` the number of each
                image's dataset, (B,) int64, where these decide the teachers. Of other teachers the
                images are shown to the model.
        """
        given = targets if isinstance(targets, Mapping) else {}

        def map_of(name: str, teacher: Any) -> FeatureMap:
            if name not in given:
                alone = name in self._mosaics and not self.training
                return teacher(images, alone=True) if alone else teacher(images)
            if isinstance(given[name], FeatureMap):
                return given[name]
            return teacher.of_stored(images, given[name])

        with torch.no_grad():
            maps = {name: map_of(name, teacher) for name, teacher in self._teachers.items()}
        return {**given, **maps}

    def draws(self, seed: int, epoch: int, positions: Tensor) -> Tensor | None:
        """Returns the coins for the teachers that are not the worst; None: nothing is dropped."""
        if self._weighting.rule != "drop":
            return None
        return coins(
            seed,
            epoch,
            positions,
            teachers=len(self._teachers),
            drop_probability=self._weighting.drop_probability,
        )

    def prepare(
        self,
        images: Tensor,
        targets: Any,
        keep: Tensor | None,
        draws: Tensor | None = None,
    ) -> dict[str, Any]:
        """Returns the student's pixels, the drop-path draws and the teachers' maps.

        Args:
            images, targets: See `learnt`.
            keep: (num_sites, B) bool, or None for no drop path.
            draws: (teachers - 1, B) bool, where teachers are dropped.
        """
        given = targets if isinstance(targets, Mapping) else {}

        def maps() -> Mapping[str, FeatureMap]:
            with torch.no_grad():
                learnt = self.learnt(images, targets)
            return {name: learnt[name] for name in self._teachers}

        is_beside = self._teachers_beside and self.training
        found = beside(maps, (images, given), images.device) if is_beside else maps()
        with torch.no_grad():
            pixels = normalise(images, self.statistics)
        return {
            "pixels": pixels,
            "keep": keep,
            "maps": found,
            "chooses": given.get(DATASETS, draws),
        }

    def two_passes(self, micro_batches: int) -> bool:
        """Statistics of a step, and the number of teachers that it keeps, are of all its images."""
        return self._weighting.rule != "fixed" or bool(self._of_step) or bool(self._queues)

    def begin_sums(self, micro_batches: int) -> None:
        """Lets the queues know at which places the summaries of the step belong."""
        for queue in self._queues:
            queue.begin(micro_batches)

    @property
    def _of_step(self) -> dict[str, RunningStatistics]:
        """What normalises by the statistics of a step, by the targets' labels."""
        return {
            t.label: t.running for t in self.targets if t.running is not None and t.running.of_step
        }

    def sums(self, forward: Callable[..., Any], prepared: dict[str, Any]) -> Tensor:
        """Returns sums over the teachers' tokens, and the number of kept teachers.

        Args: As in `Task`. The student is not run.
        """
        tokens = list(self._teacher_tokens(prepared["pixels"], prepared["maps"]))
        parts = [
            target.running.sums_of(own)
            for target, own in zip(self.targets, tokens, strict=True)
            if target.running is not None and target.running.of_step
        ]
        parts += [
            target.queue.placed(own[:, 0])
            for target, own in zip(self.targets, tokens, strict=True)
            if target.queue is not None
        ]
        if self._weighting.rule != "fixed":
            images = len(prepared["pixels"])
            zeros = prepared["pixels"].new_zeros(len(self._teachers), images)
            parts.append(self._kept(zeros, prepared["chooses"]).sum().double().reshape(1))
        return torch.cat(parts)

    def with_totals(
        self, prepared: dict[str, Any], totals: Tensor, *, parts: int
    ) -> dict[str, Any]:
        """Returns the arguments of `forward` with the numbers of the step."""
        targets = self._of_step
        images = len(prepared["pixels"]) * parts
        sizes = [one.num_sums for one in targets.values()]
        sizes += [queue.num_sums(images) for queue in self._queues]
        *sums, number = totals.split([*sizes, len(totals) - sum(sizes)])
        for queue, batch in zip(self._queues, sums[len(targets) :], strict=True):
            queue.take(batch)
        self._agreed = {
            label: running.moments_of(part)
            for (label, running), part in zip(targets.items(), sums[: len(targets)], strict=True)
        }
        return {**prepared, "step": self._agreed, "number": number, "parts": parts}

    def _kept(self, losses: Tensor, chooses: Tensor | None) -> Tensor:
        """Returns which teachers each image learns from, (teachers, B) bool.

        Without draws or datasets, as where a step is counted on shapes, they are all kept.

        Args:
            losses: (teachers, B), by name.
            chooses: As in what `prepare` returns.
        """
        if chooses is None:
            return torch.ones_like(losses, dtype=torch.bool)
        if self._weighting.rule == "own_data":
            return kept_of_own_data(chooses, self._teaches)
        return kept_beside_worst(losses, chooses)

    def before_step(self, progress: float) -> None:
        """Drops what was noted outside of a step, such as in a trial."""
        self._momentum = momentum_at(progress)
        self._agreed, self._noted = {}, {}

    def after_step(self) -> None:
        """Moves the running statistics by those of the step."""
        noted: dict[str, Tensor] = {}
        if self._noted:
            totals = distributed.sum_tensor(torch.cat(list(self._noted.values())))
            sums = totals.split([len(part) for part in self._noted.values()])
            for label, part in zip(self._noted, sums, strict=True):
                noted[label] = part
        for target in self.targets:
            if (running := target.running) is not None:
                moments = self._agreed.get(target.label) or running.moments_of(noted[target.label])
                running.move(moments, self._momentum)
        for queue in self._queues:
            queue.move()

    def forward(
        self,
        *,
        pixels: Tensor,
        keep: Tensor | None,
        maps: Mapping[str, FeatureMap],
        chooses: Tensor | None = None,
        step: Mapping[str, Moments] | None = None,
        number: Tensor | None = None,
        parts: int = 1,
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss and, in evaluation, how near the student is to each target.

        That is the mean cosine of projected and normalised tokens. Of several targets each has
        its loss and its cosine, and `cosine` is their mean.

        Args:
            pixels: (B, 3, H, W) float32, normalised for the student.
            keep: (num_sites, B) bool, or None for no drop path.
            maps: The teachers' maps by name, any floating-point dtype.
            chooses: (B,) datasets or (teachers - 1, B) coins, which choose the teachers.
            step: Statistics of a step by the label of a target that is normalised by them.
            number: How many pairs of image and teacher a step keeps.
            parts: Micro batches of the step on all ranks.
        """
        dtype = next(self.student.parameters()).dtype
        if any(target.reads_blocks for target in self.targets):
            student_map, blocks = with_blocks(self.student, pixels.to(dtype), keep)
        else:
            student_map, blocks = self.student(pixels.to(dtype), keep), ()
        # The residual stream may have another data type than the heads.
        student_map, *blocks = (
            map_._replace(tokens=map_.tokens.to(dtype)) for map_ in (student_map, *blocks)
        )
        losses: list[Tensor] = []
        metrics: dict[str, Tensor] = {}
        cosines: list[Tensor] = []
        chosen = self._weighting.rule != "fixed" and self.training
        for target in self.targets:
            projected, wanted = target.compared(student_map, blocks, maps[target.teacher])
            moments = step.get(target.label) if step else None
            if target.running and not target.running.of_step and self._learns():
                part = target.running.sums_of(wanted)
                self._noted[target.label] = self._noted.get(target.label, 0) + part
            if chosen:
                losses.append(target.per_image(projected, wanted, moments))
                continue
            loss = target.value(projected, wanted, moments)
            losses.append(loss)
            if not self.training:
                cosines.append(target.cosine(projected, wanted))
                if target.label:
                    metrics[f"{target.label}_loss"] = loss.detach()
                    metrics[f"{target.label}_cosine"] = cosines[-1]
        if cosines:
            metrics["cosine"] = torch.stack(cosines).mean()
        total = self._chosen(losses, chooses, number, parts) if chosen else self.combined(losses)
        if blocks:
            total = BesideLoss.apply(total, student_map.tokens)
        return total, metrics

    def _chosen(
        self, losses: Sequence[Tensor], chooses: Tensor | None, number: Tensor | None, parts: int
    ) -> Tensor:
        """Returns the loss where images choose their teachers; see `forward`.

        Args:
            losses: (B,) of each target, without its weight.
            chooses, number, parts: Of `forward`.
        """
        of_teachers: dict[str, Tensor] = {}
        for target, loss in zip(self.targets, losses, strict=True):
            of_teachers[target.teacher] = of_teachers.get(target.teacher, 0) + target.weight * loss
        table = torch.stack([of_teachers[name] for name in sorted(of_teachers)])
        kept = self._kept(table, chooses)
        total = kept.sum() if number is None else number.squeeze()
        return weighted_loss(table, kept, total, parts=parts)

    def combined(self, losses: Sequence[Any]) -> Any:
        """Returns the loss of an evaluation from those of the targets, without their weights.

        It is their sum by weight; where images choose their teachers, its mean over the teachers.

        Args:
            losses: One number, or scalar tensor, for each target.
        """
        total = reduce(add, (t.weight * loss for t, loss in zip(self.targets, losses, strict=True)))
        return total if self._weighting.rule == "fixed" else total / len(self._teachers)

    def _learns(self) -> bool:
        """Whether a forward is one of a step, and no trial."""
        return self.training and torch.is_grad_enabled()

    def references(
        self, *, pixels: Tensor, maps: Mapping[str, FeatureMap], **_: Any
    ) -> list[Tensor]:
        """Returns the normalised target tokens of `forward`, (B, N, Ct) float32 for each target.

        By the running statistics, as in evaluation.
        """
        tokens = self._teacher_tokens(pixels, maps)
        return [target.normalise(own) for target, own in zip(self.targets, tokens, strict=True)]

    def _teacher_tokens(self, pixels: Tensor, maps: Mapping[str, FeatureMap]) -> Iterator[Tensor]:
        """Yields the tokens that each target compares, (B, N, Ct) of the teacher's type."""
        student = FeatureMap(
            pixels, self.student.grid(*pixels.shape[-2:]), self.student.num_prefix_tokens
        )
        for target in self.targets:
            yield target.teacher_tokens(student, maps[target.teacher])

    def models(self) -> dict[str, nn.Module]:
        """Returns the teachers and this task; the teachers first, as they run first."""
        frozen = {}
        for name, teacher in self._teachers.items():
            model = getattr(teacher, "module", teacher)
            if isinstance(model, nn.Module):
                frozen[f"teachers.{name}." if name else "teacher."] = model
        return {**frozen, "": self}
