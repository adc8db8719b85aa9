"""The task that the engine trains: a Module that maps a batch to a loss and named metrics.

All tasks have this interface, so that the engine needs to know no teachers, heads or targets.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from fd_large.backbones import batch_norm
from fd_large.data.loader import Batch
from fd_large.engine.parts import Part
from fd_large.ranks import distributed


class Task(nn.Module):
    """A trainable Module with a loss: a backbone, and new heads.

    Attributes:
        student: The backbone; its weights are the result of a run.
        drop_path_rates: Drop-path rate of each site (residual branch) of the student, in execution
            order; the engine draws `keep`, (num_sites, B), by these rates.
        parts: Components that need sums over all images of a step (parts.py).
    """

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.drop_path_rates: tuple[float, ...] = student.drop_path_rates
        self.parts: tuple[Part, ...] = ()
        self._sizes: list[int] = []

    def learnt(self, images: Tensor, targets: Any) -> Any:
        """Returns the targets with the frozen models' outputs added, without gradient.

        The result depends on no student, and students that train together share it. With the
        returned targets, `prepare` runs no frozen model. A task without frozen models returns the
        targets unchanged. For the arguments see `prepare`.
        """
        return targets

    def draws(self, seed: int, epoch: int, positions: Tensor) -> Mapping[str, Tensor]:
        """Returns the random numbers that the task needs for each image, by name.

        They are tensors (..., B) on the CPU, without the random numbers of views and drop path.
        They are a function of the arguments alone, so that ranks, micro batches, a resume and a
        replay do not change them. A result that is not empty is passed to `prepare` as the keyword
        argument `draws`.

        Args:
            seed: The run's seed.
            epoch: Epoch, counted from 0.
            positions: (B,) int64, positions in the epoch's order, on the CPU.
        """
        return {}

    def prepare(self, images: Tensor, targets: Any, keep: Tensor | None) -> dict[str, Any]:
        """Does the work that needs no gradient, such as a teacher's forward.

        Runs under no_grad and outside the engine, so that the engine sees one forward and one
        backward per micro batch.

        Args:
            images: (B, 3, H, W) uint8, on the device.
            targets: The targets from the task's loader, on the device; None if there are none.
            keep: (num_sites, B) bool, or None for no drop path.

        Returns: the keyword arguments of `forward`.
        """
        raise NotImplementedError

    def forward(self, **prepared: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss, a float32 scalar, and detached scalar metrics by name."""
        raise NotImplementedError

    def two_passes(self, micro_batches: int) -> bool:
        """Returns whether a step needs sums over all of its images before its first backward.

        If it does, the engine prepares and holds all micro batches of the step, adds up `sums` over
        the micro batches and the ranks, and gives the totals to each micro batch (`with_totals`).
        The numbers of ranks and micro batches then change a step by no more than the rounding of
        float64 sums. By default a step needs sums if one of `parts` does. `micro_batches` counts
        those of a rank.
        """
        return bool(self._parts_of_step)

    @property
    def _parts_of_step(self) -> list[Part]:
        return [part for part in self.parts if part.of_step]

    def begin_sums(self, micro_batches: int) -> None:
        """Called on all ranks before the first `sums` of a step in two passes.

        `micro_batches` is the number of micro batches of a rank in the step.
        """
        for part in self._parts_of_step:
            part.begin(micro_batches)

    def sums(self, forward: Callable[..., Any], prepared: dict[str, Any]) -> Tensor:
        """Returns a micro batch's part of the sums over a step, (K,) float64; without gradient.

        Args:
            forward: Calls this task's `forward`, through the engine if there is an engine. A task
                whose sums need the student calls this function, which costs a second forward.
            prepared: Result of `prepare`.
        """
        sums = [part.sums(self, prepared) for part in self._parts_of_step]
        # The same on all ranks and for all micro batches, whatever their images.
        self._sizes = [len(each) for each in sums]
        return torch.cat(sums)

    def with_totals(
        self, prepared: dict[str, Any], totals: Tensor, *, parts: int
    ) -> dict[str, Any]:
        """Returns the keyword arguments of `forward`, when the sums over the step are known.

        Args:
            prepared: Result of `prepare` for a micro batch.
            totals: (K,) float64, the sum of `sums` over the micro batches of all ranks.
            parts: Number of micro batches of all ranks in the step. The engine averages their
                losses and gradients, so that a loss that is a sum over the step has to be
                multiplied by it.
        """
        for part, total in zip(self._parts_of_step, totals.split(self._sizes), strict=True):
            part.take(total, parts)
        return prepared

    def before_step(self, progress: float) -> None:
        """Called on all ranks before the first forward of a step.

        `progress` is the fraction of the run's steps that came before this step, in [0, 1).
        """
        batch_norm.forget(self.norms)
        for part in self.parts:
            part.before_step(progress)

    def after_step(self) -> None:
        """Called after each step that was not skipped.

        A task with running statistics updates them here, once a step whatever the number of micro
        batches, so that the statistics come from the same steps as the weights.
        """
        batch_norm.move(self.norms)
        notes = [part.noted() for part in self.parts]
        present = [note for note in notes if note is not None]
        if present:
            sums = distributed.sum_tensor(torch.cat(present)).split([len(n) for n in present])
            totals = iter(sums)
            notes = [None if note is None else next(totals) for note in notes]
        for part, note in zip(self.parts, notes, strict=True):
            part.after_step(note)

    @cached_property
    def norms(self) -> list[Any]:
        """The task's batch norms, whose running statistics are updated once a step."""
        return batch_norm.norms_of(self)

    def student_norms(self) -> list[Any]:
        """Returns the student's batch norms whose images can be divided into groups.

        Each group has its own statistics (`student.group_norms`).
        """
        return batch_norm.norms_of(self.student)

    def shapes_only(self, batch: Batch) -> Tensor:
        """Runs the work of a step that depends on shapes alone, for counts on the meta device.

        By default this is all of `prepare` and `forward`. A task whose work depends on the content
        of images overrides this method with the largest possible work.

        Returns: a scalar that backward can run through.
        """
        keep = self.keep_all(batch.images)
        with torch.no_grad():
            prepared = self.prepare(batch.images, batch.targets, keep)
            if self.two_passes(2):
                self.begin_sums(1)
                sums = self.sums(self, prepared)
                prepared = self.with_totals(prepared, sums, parts=distributed.world_size())
        return self(**prepared)[0]

    def keep_all(self, images: Tensor) -> Tensor | None:
        """Returns drop-path masks that keep every branch, (num_sites, B) bool of True.

        Returns None if the student has no drop path.
        """
        if not any(self.drop_path_rates):
            return None
        size = (len(self.drop_path_rates), len(images))
        return torch.ones(size, dtype=torch.bool, device=images.device)

    def models(self) -> dict[str, nn.Module]:
        """Returns {prefix: model}, the models whose layers an incident's record lists.

        In the record, the prefix precedes the layer's name in the model.
        """
        return {"": self}

    def layer_scale(self, name: str, decay: float) -> float:
        """Returns the factor of a parameter's learning rate under layer-wise decay.

        The factor falls by `decay` from each layer of the student to the layer before it; heads,
        pyramids and projections have the full learning rate. Parameters with factor 0 are not
        trained.
        """
        inside = name.removeprefix("student.")
        if inside == name or decay == 1.0:
            return 1.0
        return decay ** (self.student.last_layer - self.student.layer_id(inside))

    def no_weight_decay(self) -> tuple[frozenset[str], tuple[str, ...]]:
        """Returns (parameter names, substrings of names) that are exempt from weight decay.

        By default the student names them. One-dimensional parameters (norms, biases) are always
        exempt and need not be named.
        """
        names = frozenset(f"student.{name}" for name in self.student.no_weight_decay())
        return names, tuple(self.student.no_weight_decay_keywords())
