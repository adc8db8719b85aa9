"""Held-out loss of a run: fixed views, split over the ranks, the same on any number of them."""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor
from torch.utils.data import default_collate

from fd_large.backbones.feature_map import FeatureMap
from fd_large.data.loader import Batch
from fd_large.data.random_numbers import uniforms
from fd_large.data.sampler import samples_at
from fd_large.data.source import ImageSource
from fd_large.data.views import NUM_DRAWS, ViewSettings, random_view
from fd_large.engine.evaluation import Evaluation, Panel, evaluating
from fd_large.engine.zero.engine import Engine
from fd_large.errors import DataError
from fd_large.ranks import activity, distributed
from fd_large.tasks.distillation.alignment import Grid, resized
from fd_large.tasks.distillation.constant_prediction import constant_prediction_losses
from fd_large.tasks.distillation.section import MAP
from fd_large.tasks.distillation.target import references
from fd_large.tasks.distillation.task import Distillation

# An epoch that no training reaches, so that crops of training images are unseen ones.
EVALUATION_EPOCH = 2**31 - 1
PANEL_IMAGES = 4
PANEL_CANDIDATES = 16
"""Views of which the panel shows those that vary most; others may be blank, such as the sky."""
TRIES = 10

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Crops:
    """The views of one dataset that are shown in evaluations, by their numbers.

    Attributes:
        source: The images.
        views: Number of views; view v shows image v modulo the number of images. There are at
            least as many as the panel shows.
        settings: How an image becomes a view; its colours stay.
        seed: Seed of the crops.
        skip_bad: Whether to use the next image for one that cannot be used, as training does.
    """

    source: ImageSource
    views: int
    settings: ViewSettings
    seed: int
    skip_bad: bool = False

    def __len__(self) -> int:
        return max(self.views, PANEL_IMAGES)

    def __call__(self, view: int) -> Tensor:
        """Returns a view, (3, S, S) uint8.

        Raises: DataError: for an image that cannot be used, unless `skip_bad`.
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
        """Returns the name of the image that a view shows."""
        return self.source[self._image(view)]

    def _image(self, view: int) -> int:
        # Spread over the dataset, which may list its classes one after the other.
        place = view % min(len(self), len(self.source))
        return int(samples_at(self.source, self.seed, EVALUATION_EPOCH, np.array([place]))[0])


def most_varied(views: Sequence[Tensor], names: Sequence[str]) -> list[int]:
    """Returns the places of the views for the panel, in order: not the sky, where there is more.

    It goes by the pixels alone, so that a resumed run shows the views that it showed at its start.
    An image is shown a second time only after each of the others was shown once.

    Args:
        views: (3, S, S) uint8 each.
        names: The image that each is cut from.
    """
    spread = torch.stack([view.float().flatten(1).var(1).sum() for view in views])
    turns, taken = {}, Counter[str]()
    for view in spread.argsort(descending=True, stable=True).tolist():
        turns[view] = taken[names[view]]
        taken[names[view]] += 1
    return sorted(sorted(turns, key=turns.__getitem__)[:PANEL_IMAGES])


class HeldOutViews:
    """The views of one dataset, cut once and kept as uint8 in host memory.

    Args:
        name: Prefix of the metrics.
        crops: Cuts them.
        micro_batch_size: Views per forward.
        stored: Maps of these views, `of(number, view)` by the teacher's name; None: the teachers
            see the views.

    Raises: DataError: for an image that cannot be used, unless it is to be skipped.
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
        own = range(distributed.rank(), crops.views, world)
        self._count = len(own)
        # Under ZeRO-3 every rank must run as many forwards as the one with most views.
        self._rounds = math.ceil(math.ceil(crops.views / world) / micro_batch_size)
        self._numbers: Sequence[int] = own or (0,)
        self._images = torch.stack([crops(view) for view in self._numbers])
        # The panel shows the same images on any number of ranks.
        candidates = [crops(view) for view in range(min(PANEL_CANDIDATES, len(crops)))]
        names = [crops.name_of(view) for view in range(len(candidates))]
        self._panel_numbers = most_varied(candidates, names)
        self._panel = torch.stack([candidates[view] for view in self._panel_numbers])

    def measure(self, engine: Engine, between: Callable[[], None]) -> dict[str, float]:
        """Returns the mean loss and the task's metrics over all views, the same on every rank.

        Args:
            engine: The engine of the task that is measured.
            between: Called before each batch, on every rank alike; may raise to end it.
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
        """Returns the loss of the constant-prediction baseline on these views.

        Beside that of the task there is one for each of several targets, by its label.
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
        own = {f"{target.label}_best_constant": loss for target, loss in pairs if target.label}
        total = task.join.combined(task.targets, losses)
        return {f"{self.name}_{key}": loss for key, loss in {**own, "best_constant": total}.items()}

    def targets(self, engine: Engine, number: int = 0) -> Iterator[tuple[Tensor, int]]:
        """Yields the tokens of a target, (B, N, C) float32, and their weight, 0 for padding.

        Args:
            engine: The engine of the task.
            number: The target's place in `Distillation.targets`.
        """
        assert isinstance(engine.task, Distillation)
        with evaluating(engine):
            for prepared, weight, _ in self._batches(engine):
                yield references(engine.task, **prepared)[number], weight

    def panel(self, engine: Engine) -> dict[str, np.ndarray]:
        """Returns the maps of a few views, the same in every call: see `feature_panel`."""
        assert isinstance(engine.task, Distillation)
        with evaluating(engine):
            shown = self._batch(self._panel, self._panel_numbers)
            maps = feature_panel(engine.task, engine.deepspeed, shown.images, shown.targets)
        return {name: value.numpy() for name, value in maps.items()}

    def _batches(self, engine: Engine) -> Iterator[tuple[dict[str, Any], int, int]]:
        words = f"{self.name.replace('_', ' ')} views"
        for number in activity.counted(range(self._rounds), words, "batches"):
            start = number * self._micro
            own = slice(start, min(start + self._micro, self._count))
            images, weight = self._images[own], 1
            if len(images) == 0:
                own, images, weight = slice(1), self._images[:1], 0
            batch = self._batch(images, self._numbers[own])
            prepared = engine.task.prepare(batch.images, batch.targets, None)
            yield prepared, weight, len(images)

    def _batch(self, images: Tensor, numbers: Sequence[int]) -> Batch:
        """The views of some numbers on the device, with their maps where these are stored."""
        maps = None
        if self._stored is not None:
            maps = default_collate(
                [self._stored.of(*one) for one in zip(numbers, images, strict=True)]
            )
        views = torch.tensor(numbers)
        batch = Batch(images, EVALUATION_EPOCH, views, views, targets=maps)
        return batch.to(distributed.device())


def held_out_losses(sets: Sequence[HeldOutViews], engine: Engine, *, every: int) -> Evaluation:
    """Returns what measures all sets of views, and at the end the constant-prediction baseline.

    Its panel, before the first step and after the last, is of the first set.

    Args:
        sets: The sets of views.
        engine: The engine of the task that is measured.
        every: Number of steps between two evaluations.
    """

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


def feature_panel(
    task: Distillation, forward: Callable[..., Any], images: Tensor, targets: Any = None
) -> dict[str, Tensor]:
    """Computes the maps of a few images, without gradient.

    Args:
        task: The task, in evaluation mode.
        forward: Runs the task (its engine).
        images: (n, 3, S, S) uint8, on the device.
        targets: See `Distillation.learnt`.

    Returns: "images" (n, S, S, 3) uint8; "teacher" (n, h, w, C), normalised, and "student"
        (n, h, w, C), projected, float32; of several teachers teacher_NAME and student_NAME. All in
        host memory.
    """
    seen: dict[str, Tensor] = {}
    shown = [target for target in task.targets if target.kind == MAP]

    def note(label: str) -> Callable[..., None]:
        def hook(_module: Any, _inputs: Any, output: Tensor | FeatureMap) -> None:
            tokens = output.tokens if isinstance(output, FeatureMap) else output
            seen[label] = tokens.detach().float().cpu()

        return hook

    handles = [target.head.register_forward_hook(note(target.label)) for target in shown]
    with torch.no_grad():
        prepared = task.prepare(images, targets, None)
        forward(**prepared)
        taught = references(task, **prepared)
    for handle in handles:
        handle.remove()

    def as_map(tokens: Tensor, grid: Grid) -> Tensor:
        h, w = grid
        return rearrange(tokens[:, tokens.shape[1] - h * w :], "n (h w) c -> n h w c", h=h, w=w)

    own = task.student.grid(*images.shape[-2:])
    maps = {"images": rearrange(images, "n c h w -> n h w c").cpu()}
    for target, reference in zip(task.targets, taught, strict=True):
        if target.kind == MAP:
            end = f"_{target.label}" if target.label else ""
            grid, _ = target.given(own, 0)
            places = target.places(own, prepared["maps"][target.teacher].grid)
            maps[f"teacher{end}"] = as_map(reference.cpu(), places)
            tokens = as_map(seen[target.label], grid).flatten(1, 2)
            projected = resized(FeatureMap(tokens, grid, 0), places, antialias=False)
            maps[f"student{end}"] = as_map(projected.tokens, places)
    return maps
