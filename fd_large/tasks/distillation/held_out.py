"""Held-out loss of a run, on fixed views that are the same for any number of ranks."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from fd_large.data.loader import Batch
from fd_large.data.random_numbers import uniforms
from fd_large.data.sampler import samples_at
from fd_large.data.source import ImageSource
from fd_large.data.views import NUM_DRAWS, ViewSettings, random_view
from fd_large.engine.evaluation import Evaluation, Panel, evaluating
from fd_large.engine.zero.engine import Engine
from fd_large.errors import DataError
from fd_large.ranks import activity, distributed
from fd_large.tasks.distillation.feature_panel import (
    PANEL_CANDIDATES,
    PANEL_IMAGES,
    feature_panel,
    most_varied,
)
from fd_large.tasks.distillation.losses import Loss
from fd_large.tasks.distillation.target import references
from fd_large.tasks.distillation.task import Distillation

# An epoch that no training reaches, so that crops of training images are unseen ones.
EVALUATION_EPOCH = 2**31 - 1
TRIES = 10
# The search for the best constant makes at most this number of passes over the views, and ends
# before, from pass 3 on (counted from 0), if a pass lowers the loss by less than this share.
MOST_PASSES, ENOUGH = 12, 1e-3

Prepared = dict[str, Any]

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Crops:
    """The evaluation views of a dataset, by index.

    Each view is a random crop of the next image, in an order that is drawn from the seed and begins
    again after the last image.

    Attributes:
        source: The images.
        views: Number of views to evaluate. `len` is at least `PANEL_IMAGES`, the number of views in
            the feature panel.
        settings: Settings of the views; colours are not changed.
        seed: Seed of the order and of the crops.
        skip_bad: Whether an unusable image is replaced by the next image, in at most `TRIES` tries.
    """

    source: ImageSource
    views: int
    settings: ViewSettings
    seed: int
    skip_bad: bool = False

    def __len__(self) -> int:
        return max(self.views, PANEL_IMAGES)

    def __call__(self, view: int) -> Tensor:
        """Returns view number `view`, counted from 0, as (3, S, S) uint8.

        If the view's image cannot be used and `skip_bad` is True, the view is cut from the next
        image, for at most `TRIES` images.

        Raises:
            DataError: if the image cannot be used and `skip_bad` is False, or if no image in
                `TRIES` tries can be used.
        """
        draws = uniforms(self.seed, EVALUATION_EPOCH, [view], "view", NUM_DRAWS)[0].tolist()
        tries = TRIES if self.skip_bad else 1
        for number in range(tries):
            try:
                return random_view(self.source, self._image(view + number), draws, self.settings)
            except DataError as error:
                if number + 1 == tries:
                    raise
                log.warning("skipped in evaluation: %s", error)
        raise AssertionError("one try at least")

    def name_of(self, view: int) -> str:
        """Returns the name of the image from which view number `view` is cut.

        If this image cannot be used and `skip_bad` is True, the view is cut from a later image,
        whose name is not returned.
        """
        return self.source[self._image(view)]

    def _image(self, view: int) -> int:
        """Returns the index in `source` of the image from which view number `view` is cut."""
        # Spread over the dataset, which may list its classes one after the other.
        place = view % min(len(self), len(self.source))
        return int(samples_at(self.source, self.seed, EVALUATION_EPOCH, np.array([place]))[0])


class HeldOutViews:
    """A rank's evaluation views of a dataset, cropped once and held as uint8 in host memory.

    Args:
        name: Prefix of the metrics.
        crops: The views of the dataset.
        micro_batch_size: Number of views per forward.
        stored: Loader of the stored maps of these views (`StoredMaps`); None if the teachers
            compute the maps.

    Raises: DataError: if an image cannot be used; see `Crops`.
    """

    def __init__(
        self,
        name: str,
        crops: Crops,
        *,
        micro_batch_size: int,
        stored: Any = None,
    ) -> None:
        self.name, self._micro = name, micro_batch_size
        self._stored = stored
        world = distributed.world_size()
        own_views = range(distributed.rank(), crops.views, world)
        self._count = len(own_views)
        # Under ZeRO-3 every rank must run as many forwards as the rank with most views.
        self._rounds = math.ceil(math.ceil(crops.views / world) / micro_batch_size)
        self._numbers: Sequence[int] = own_views or (0,)
        self._images = torch.stack([crops(view) for view in self._numbers])
        # The panel shows the same images on any number of ranks.
        candidates = [crops(view) for view in range(min(PANEL_CANDIDATES, len(crops)))]
        names = [crops.name_of(view) for view in range(len(candidates))]
        self._panel_numbers = most_varied(candidates, names)
        self._panel = torch.stack([candidates[view] for view in self._panel_numbers])

    def measure(self, engine: Engine, between: Callable[[], None]) -> dict[str, float]:
        """Returns the means of the loss and of the task's metrics over all views, by name.

        All ranks must call this method, and the result is the same on all ranks.

        Args:
            engine: The engine of the task that is measured.
            between: Called before each batch on every rank; may raise to stop.
        """
        totals: dict[str, Tensor] = {}
        with evaluating(engine):
            for prepared, weight, count in self._batches(engine):
                between()
                loss, metrics = engine.deepspeed(**prepared)
                for key, value in {"loss": loss, **metrics}.items():
                    part = value.double() * weight * count
                    totals[key] = totals[key] + part if key in totals else part
        views = distributed.sum_tensor(
            torch.tensor(self._count, dtype=torch.float64, device=distributed.device())
        )
        means = distributed.sum_tensor(torch.stack(list(totals.values()))) / views
        names = [f"{self.name}_{key}" for key in totals]
        return dict(zip(names, means.tolist(), strict=True))

    def best_constant(self, engine: Engine, between: Callable[[], None]) -> dict[str, float]:
        """Returns the losses of the constant-prediction baseline on these views, by metric name.

        These losses are the loss of the task, and the unweighted loss of each target with a label
        (`constant_prediction_losses`). All ranks must call this method.

        Args:
            engine: The engine of the task.
            between: Called before each batch on every rank; may raise to stop.
        """

        def batches() -> Iterator[tuple[dict[str, Any], int]]:
            for prepared, weight, _ in self._batches(engine):
                between()
                yield prepared, weight

        task = engine.task
        assert isinstance(task, Distillation)
        with evaluating(engine):
            losses = constant_prediction_losses(task, batches, distributed.sum_tensor)
        pairs = list(zip(task.targets, losses, strict=True))
        baselines = {
            f"{target.label}_best_constant": loss for target, loss in pairs if target.label
        }
        baselines["best_constant"] = task.join.combined(task.targets, losses)
        return {f"{self.name}_{key}": loss for key, loss in baselines.items()}

    def tokens(self, engine: Engine, number: int = 0) -> Iterator[tuple[Tensor, int]]:
        """Yields (tokens, weight) for each batch, with the normalised teacher tokens of a target.

        The tokens are (B, N, C) float32. The weight is 1, or 0 for a batch that a rank without
        views left repeats, so that all ranks run the same number of forwards.

        Args:
            engine: The engine of the task.
            number: The target's index in `Distillation.targets`.
        """
        assert isinstance(engine.task, Distillation)
        with evaluating(engine):
            for prepared, weight, _ in self._batches(engine):
                yield references(engine.task, **prepared)[number], weight

    def panel(self, engine: Engine) -> dict[str, np.ndarray]:
        """Returns the maps of `PANEL_IMAGES` fixed views, as arrays by name.

        Among the first `PANEL_CANDIDATES` views, these are the views whose pixels vary most, on any
        number of ranks. All ranks must call this method; see `feature_panel` for the names and
        shapes.

        Args:
            engine: The engine of the task whose maps are returned.
        """
        assert isinstance(engine.task, Distillation)
        with evaluating(engine):
            shown = self._batch(self._panel, self._panel_numbers)
            maps = feature_panel(engine.task, engine.deepspeed, shown.images, shown.targets)
        return {name: value.numpy() for name, value in maps.items()}

    def _batches(self, engine: Engine) -> Iterator[tuple[dict[str, Any], int, int]]:
        """Yields (arguments of the task's forward, weight, number of views) for each batch.

        All ranks yield the same number of batches. A rank without views left repeats its first
        view, with the weight 0; all other batches have the weight 1.

        Args:
            engine: The engine of the task, which prepares the arguments.
        """
        words = f"{self.name.replace('_', ' ')} views"
        for number in activity.counted(range(self._rounds), words, "batches"):
            start = number * self._micro
            rows = slice(start, min(start + self._micro, self._count))
            images, weight = self._images[rows], 1
            if len(images) == 0:
                rows, images, weight = slice(1), self._images[:1], 0
            batch = self._batch(images, self._numbers[rows])
            prepared = engine.task.prepare(batch.images, batch.targets, None)
            yield prepared, weight, len(images)

    def _batch(self, images: Tensor, numbers: Sequence[int]) -> Batch:
        """Returns a batch on the device, whose targets are the stored maps of the views.

        If the teachers compute the maps, the batch has no targets.

        Args:
            images: (B, 3, S, S) uint8, the views.
            numbers: Indices of these B views in `Crops`.
        """
        maps = None
        if self._stored is not None:
            maps = default_collate(
                [self._stored.of(*pair) for pair in zip(numbers, images, strict=True)]
            )
        views = torch.tensor(numbers)
        batch = Batch(images, EVALUATION_EPOCH, views, views, targets=maps)
        return batch.to(distributed.device())


def held_out_losses(
    crops: Mapping[str, Crops],
    engine: Engine,
    *,
    every: int,
    micro_batch_size: int,
    stored: Callable[[str, Crops], Any],
) -> Evaluation:
    """Makes the evaluation that measures the losses on all sets of views.

    The evaluation after the last step also measures the constant-prediction baseline. The
    evaluations before the first step and after the last step also return the feature panel, which
    shows views of the first set. All ranks must call this function.

    Args:
        crops: The views of each set, by the prefix of the set's metrics.
        engine: The engine of the task that is measured.
        every: Number of steps between two evaluations.
        micro_batch_size: Number of views per forward.
        stored: Returns the loader of a set's stored maps, or None; see `HeldOutViews`.
    """
    sets = distributed.together(
        lambda: [
            HeldOutViews(name, cut, micro_batch_size=micro_batch_size, stored=stored(name, cut))
            for name, cut in crops.items()
        ]
    )

    def measure(
        step: int, last: bool, between: Callable[[], None]
    ) -> tuple[dict[str, float], Panel | None]:
        metrics: dict[str, float] = {}
        for views in sets:
            metrics |= views.measure(engine, between)
            if last:
                metrics |= views.best_constant(engine, between)
        return metrics, sets[0].panel(engine) if step == 0 or last else None

    return Evaluation(measure, every)


def constant_prediction_losses(
    task: Distillation,
    batches: Callable[[], Iterator[tuple[Prepared, int]]],
    summed: Callable[[Tensor], Tensor],
) -> list[float]:
    """Returns for each target the loss of the best prediction that is the same for all tokens.

    Such a prediction is a vector of the target's C channels. These losses are the
    constant-prediction baseline: a student that learnt only the mean of its targets has about these
    losses. The search begins at the mean of the target's tokens. If the loss has a slope and a
    curvature (`Loss.newton`), Newton steps lead from the mean towards the minimum; otherwise the
    mean is the prediction.

    Args:
        task: The task with the targets, in evaluation mode.
        batches: Called once per pass over the views; yields (result of the task's `prepare`,
            weight). The weight is 0 for a repeated batch that must not count, else 1.
        summed: Sums a tensor over the ranks.

    Returns: the unweighted loss of each of `task.targets`.
    """
    searches = [_Search(target.loss) for target in task.targets]
    # Pass 0 gives the means; each later pass gives the losses of the present constants and the
    # Newton steps from them.
    for _ in range(MOST_PASSES):
        for prepared, weight in batches():
            for search, tokens in zip(searches, references(task, **prepared), strict=True):
                search.add(tokens, weight)
        for search in searches:
            search.step(summed)
        if all(search.done for search in searches):
            break
    return [search.least for search in searches]


class _Search:
    """Search for the best constant prediction of a target, by a step after each pass over views.

    Args:
        loss: The target's loss.

    Attributes:
        least: The smallest loss so far.
        done: Whether the search has ended.
    """

    def __init__(self, loss: Loss) -> None:
        self._loss = loss
        self._constant: Tensor | None = None
        self._totals: Tensor | None = None
        self._passes, self._moves = 0, True
        self._last, self.least, self.done = float("nan"), float("inf"), False

    def add(self, tokens: Tensor, weight: int) -> None:
        """Adds a batch to the sums of a pass.

        Args:
            tokens: (B, N, C) float32, the normalised teacher tokens of the batch.
            weight: 1, or 0 for a repeated batch that must not count.
        """
        if self.done:
            return
        if self._constant is None:
            self._constant = torch.zeros_like(tokens[0, 0])
        constant = self._constant
        rows = [tokens.sum((0, 1)), torch.zeros_like(constant)]
        if self._passes and (slopes := self._loss.newton(constant, tokens)):
            rows = list(slopes)
        else:
            self._moves = not self._passes
        lost = self._loss(constant.expand_as(tokens), tokens) * len(tokens)
        sums = torch.stack([*rows, lost.expand_as(constant)]).double()
        counts = sums.new_tensor([[len(tokens)], [tokens[..., 0].numel()]])
        part = torch.cat([sums, counts.expand(2, sums.shape[1])]) * weight
        self._totals = part if self._totals is None else self._totals + part

    def step(self, summed: Callable[[Tensor], Tensor]) -> None:
        """Ends a pass over the views, and moves the constant prediction or ends the search.

        The first pass sets the constant to the mean of the tokens. The search ends, which sets
        `done`, if the loss has no `newton`, or if at least two Newton steps were made and the last
        of them hardly lowered the loss. All ranks must call this method.

        Args:
            summed: Sums a tensor over the ranks.
        """
        if self.done:
            return
        assert self._totals is not None
        assert self._constant is not None
        first, second, lost_sum, images, places = summed(self._totals)
        before, loss = self._last, (lost_sum[0] / images[0]).item()
        number, self._totals, self._last = self._passes, None, loss
        self._passes += 1
        if number == 0:
            self._constant = (first / places).float()
            return
        self.least = min(self.least, loss)
        if not self._moves or (number >= 3 and not loss < before * (1 - ENOUGH)):
            self.done = True
            return
        step_down = torch.where(second > 0, first / second, 0.0)
        self._constant = (self._constant - step_down).float()
        self._moves = True
