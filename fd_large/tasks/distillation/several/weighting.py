"""The choice of each image's teachers, over the images of a whole step.

The loss of a step is the mean over all kept pairs of image and teacher. Published code computes the
mean on each rank, so that a pair has more weight on a rank that keeps few pairs, and the loss
changes with the number of ranks. Here the number of kept pairs is known for the whole step before
the student runs. The rule "drop" keeps an image's worst teacher, which is the teacher with the
largest loss. For each of the other teachers a random number decides; the k-th number is for the
k-th of the other teachers, in the order of names. Therefore the number of kept teachers does not
depend on the losses, and the distribution is the published one.

Source: Sariyildiz et al. (UNIC), arXiv 2408.05088, and Sariyildiz et al. (DUNE), arXiv 2503.14405.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, cast

import torch
from numpy.typing import ArrayLike
from torch import Tensor, nn

from fd_large.data.balanced import Balanced
from fd_large.data.loader import Batch
from fd_large.data.random_numbers import uniforms
from fd_large.data.roots import weighted_roots
from fd_large.data.source import ImageSource
from fd_large.engine.parts import Part
from fd_large.recipes.fields import require
from fd_large.recipes.sections import Data
from fd_large.tasks.distillation.section import NamedTeacher, Weighting
from fd_large.tasks.distillation.task import Comparison, Drawn, Maps, Sum, Target

DATASETS = ".datasets"
"""Key in a batch's targets for the number of each image's dataset, (B,) int64. No teacher may have
this name."""


class Weighted(Part):
    """Combines losses so that only some teachers count for an image (`join` of `Distillation`).

    A pair of an image and a teacher is kept if the teacher counts for the image. The loss is the
    mean over the kept pairs of a step. In this mean an image has the weight that
    `Distillation.sight.shares` returns.

    Args:
        weighting: The rule, and the probability of dropping a teacher.
        targets: The teachers' targets.
        teaches: For the rule own_data, whether a teacher teaches the images of a dataset, as a
            table (teachers in the order of their names, datasets); empty for other rules.
    """

    def __init__(
        self,
        weighting: Weighting,
        targets: Sequence[Target],
        teaches: Sequence[Sequence[bool]] = (),
    ) -> None:
        self._weighting = weighting
        self._names = sorted({target.teacher for target in targets})
        self._teaches = _Teaches(teaches)
        self._number: Tensor | None = None
        self._micro_batches = 1

    def modules(self) -> dict[str, nn.Module]:
        """Returns {"teaches": the Module with the table of which teacher teaches which dataset}.

        The table is in a Module, so that it moves to the device with the task.
        """
        return {"teaches": self._teaches}

    def parts(self) -> tuple[Part, ...]:
        """Returns (self,), the part that sums over a whole step.

        It sums the number of kept pairs: pairs of an image and a teacher that counts for the image.
        """
        return (self,)

    def draws(self, seed: int, epoch: int, positions: Tensor) -> Drawn:
        """Draws the random numbers of the rule "drop" for the images of a batch.

        Args:
            seed: The run's seed.
            epoch: Epoch, counted from 0.
            positions: (B,), positions of the images in the epoch's order.

        Returns: {"coins": the result of `coins`, (T - 1, B) bool}; empty for other rules.
        """
        if self._weighting.rule != "drop":
            return {}
        return {
            "coins": coins(
                seed,
                epoch,
                positions,
                teachers=len(self._names),
                drop_probability=self._weighting.drop_probability,
            )
        }

    def __call__(self, comparisons: Sequence[Comparison], maps: Maps, drawn: Drawn) -> Tensor:
        """Returns the training loss of a micro-batch, a scalar; see `weighted_loss`.

        Args:
            comparisons: The comparison of student and teacher for each target.
            maps: The batch's targets, with the images' datasets for the rule own_data.
            drawn: The result of `draws`.
        """
        of_teachers: dict[str, Tensor] = {}
        for comparison in comparisons:
            target = comparison.target
            losses = target.weight * comparison.per_image()
            of_teachers[target.teacher] = of_teachers.get(target.teacher, 0) + losses
        table = torch.stack([of_teachers[name] for name in self._names])
        shares = comparisons[0].shares()
        kept_pairs = self._kept(table, maps, drawn)
        number = (kept_pairs * shares).sum() if self._number is None else self._number.squeeze()
        return weighted_loss(table * shares, kept_pairs, number, parts=self._micro_batches)

    def combined(self, targets: Sequence[Target], losses: Sequence[Any]) -> Any:
        """Returns the loss of an evaluation, a mean over teachers.

        Args:
            targets: The targets of all teachers.
            losses: The unweighted loss of each target, which is multiplied by the target's weight.
        """
        return Sum().combined(targets, losses) / len(self._names)

    def sums(self, task: Any, prepared: dict[str, Any]) -> Tensor:
        """Returns the number of kept pairs of image and teacher in a micro-batch, (1,) float64.

        A pair is kept if the teacher counts for the image. It adds the weight of its image, which
        `Distillation.sight.shares` returns, instead of 1.

        Args:
            task: The task, whose student is not run.
            prepared: Result of the task's `prepare` on the micro-batch.
        """
        shares = task.sight.shares(prepared["drawn"], prepared["pixels"])
        zeros = prepared["pixels"].new_zeros(len(self._names), len(shares))
        kept_pairs = self._kept(zeros, prepared["maps"], prepared["drawn"])
        return (kept_pairs * shares).sum().double().reshape(1)

    def take(self, totals: Tensor, micro_batches: int) -> None:
        """Stores the numbers of a step.

        Args:
            totals: (1,), the sum of the results of `sums` over the micro-batches of all ranks.
            micro_batches: Number of micro-batches of the step on all ranks.
        """
        self._number, self._micro_batches = totals, micro_batches

    def before_step(self, progress: float) -> None:
        """Drops the numbers that `take` stored earlier.

        Args:
            progress: Fraction of the run's steps that were done before; not used.
        """
        self._number, self._micro_batches = None, 1

    def _kept(self, losses: Tensor, maps: Maps, drawn: Drawn) -> Tensor:
        """Returns whether each teacher counts for each image, (teachers, B) bool.

        All teachers count if the rule needs random numbers that `drawn` does not have, or
        datasets that `maps` does not have, as when operations are counted by shapes.

        Args:
            losses: (teachers, B), which the rule "drop" compares.
            maps: The batch's targets, with the images' datasets for the rule own_data.
            drawn: The result of `draws`.
        """
        if self._weighting.rule == "own_data" and DATASETS in maps:
            return kept_of_own_data(maps[DATASETS], self._teaches.rows)
        if "coins" in drawn:
            return kept_beside_worst(losses, drawn["coins"])
        return torch.ones_like(losses, dtype=torch.bool)


class _Teaches(nn.Module):
    """Module for the table of whether a teacher teaches the images of a dataset.

    The buffer `rows` is (teachers, datasets) bool, and is left out of checkpoints.

    Args:
        rows: For each teacher a list with an entry for each dataset; may be empty.
    """

    rows: Tensor

    def __init__(self, rows: Sequence[Sequence[bool]]) -> None:
        super().__init__()
        # Cell by cell: under deepspeed.zero.Init a tensor made of lists may have another type.
        table = torch.zeros(len(rows), len(rows[0]) if rows else 0, dtype=torch.bool)
        for number, row in enumerate(rows):
            for dataset, teaches in enumerate(row):
                table[number, dataset] = teaches
        self.register_buffer("rows", table, persistent=False)


def coins(
    seed: int, epoch: int, positions: ArrayLike, *, teachers: int, drop_probability: float
) -> Tensor:
    """Draws which teachers besides the worst count for an image, (T - 1, B) bool on the CPU.

    The worst teacher of an image is the teacher with the largest loss, which always counts. Row k
    is for the k-th of the other teachers.

    Args:
        seed: The run's seed.
        epoch: Epoch, counted from 0.
        positions: (B,), positions of the images in the epoch's order.
        teachers: Number of teachers, T.
        drop_probability: Probability of dropping each teacher, in [0, 1].
    """
    draws = uniforms(seed, epoch, positions, "teachers", teachers - 1)
    return torch.from_numpy(draws >= drop_probability).T.contiguous()


def kept_beside_worst(losses: Tensor, coins: Tensor) -> Tensor:
    """Returns whether each teacher counts for each image, (T, B) bool.

    The worst teacher of an image, which is the teacher with the largest loss, always counts.

    Args:
        losses: (T, B), the loss of each image by each teacher. Of teachers with the same loss, the
            first counts as the worst.
        coins: (T - 1, B) bool, whether each teacher except the worst counts, in the teachers'
            order.
    """
    worst = losses.detach().argmax(0, keepdim=True)
    numbers = torch.arange(len(losses), device=losses.device)[:, None]
    others = (numbers - (numbers > worst).long()).clamp(max=len(coins) - 1)
    return (numbers == worst) | coins.gather(0, others)


def kept_of_own_data(datasets: Tensor, teaches: Tensor) -> Tensor:
    """Returns whether each teacher teaches the dataset of each image, (T, B) bool.

    Args:
        datasets: (B,) int64, the number of each image's dataset.
        teaches: (T, number of datasets) bool, whether a teacher teaches the images of a dataset.
    """
    return teaches[:, datasets]


def weighted_loss(losses: Tensor, kept_pairs: Tensor, number: Tensor, *, parts: int) -> Tensor:
    """Returns the training loss of a micro-batch, a scalar.

    The mean over all micro-batches of a step is the mean loss of the step's kept pairs, which are
    the pairs of an image and a teacher that counts for the image.

    Args:
        losses: (T, B), the loss of each image by each teacher, times the weight of the image.
        kept_pairs: (T, B) bool, whether a teacher counts for an image.
        number: Number of kept pairs in the whole step, each counted as the weight of its image, a
            scalar. If it is 0, the loss is 0.
        parts: Number of micro-batches of the step on all ranks. The engine averages losses and
            gradients over these micro-batches.
    """
    # Not by a product, since a loss that is left out may be infinite.
    return parts * losses.where(kept_pairs, 0).sum() / number.to(losses).clamp(min=1)


def with_datasets(batches: Iterator[Batch], samples: ImageSource) -> Iterator[Batch]:
    """Yields micro-batches whose targets also hold the number of each image's dataset.

    Args:
        batches: The micro-batches.
        samples: The images, a `Balanced` mixture of datasets.
    """
    datasets_of = cast(Balanced, samples).datasets_of
    for batch in batches:
        datasets = torch.from_numpy(datasets_of(batch.indices.numpy()))
        if batch.images.is_pinned():
            datasets = datasets.pin_memory()
        yield replace(batch, targets={**(batch.targets or {}), DATASETS: datasets})


def teaches(
    weighting: Weighting, teachers: Mapping[str, NamedTeacher], data: Data
) -> list[list[bool]]:
    """Returns which datasets each teacher teaches under the rule own_data.

    Args:
        weighting, teachers, data: Sections of the recipe.

    Returns: for each teacher in the order of names, a list of whether the teacher teaches each
        dataset of `data.root`; an empty list for the other rules.
    Raises:
        ConfigError or DataError: if a dataset has no teacher or does not exist, or if images are
            mixed (`data.image_mixup`), as a mixed image would belong to two datasets.
    """
    if weighting.rule != "own_data":
        return []
    entries = sorted((name, entry.datasets) for name, entry in teachers.items())
    require(
        not data.image_mixup,
        "weighting.rule: a mixed image may come from two datasets",
        f"own_data with data.image_mixup {data.image_mixup}",
        "one of the two",
        "Leave data.image_mixup out",
    )
    names = [part.name for part in weighted_roots(data.root)]
    require(
        len(names) > 1,
        "weighting.rule: own_data needs several datasets with names",
        f"data.root {data.root!r}",
        "a weighted sum of named datasets",
        "Name the datasets as in docs/data.md",
    )
    for name, datasets in entries:
        other = [dataset for dataset in datasets if dataset not in names]
        require(
            not other,
            f"teachers.{name}.datasets: no such dataset in data.root",
            ", ".join(other),
            f"some of {', '.join(names)}",
            "Correct the name",
        )
    taught = {dataset for _, datasets in entries for dataset in datasets}
    require(
        taught.issuperset(names),
        "weighting.rule: own_data leaves images without a teacher",
        f"no teacher of {', '.join(name for name in names if name not in taught)}",
        "at least one for each dataset",
        "Name these datasets in --teachers.NAME.datasets",
    )
    return [[dataset in datasets for dataset in names] for _, datasets in entries]
