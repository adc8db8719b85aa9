"""Held-out loss of a run: fixed views, split over the ranks, the same on any number of them."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from fd_large import activity, distributed
from fd_large.backbones.feature_map import FeatureMap
from fd_large.data.random_numbers import uniforms
from fd_large.data.sampler import samples_at
from fd_large.data.source import ImageSource
from fd_large.data.views import NUM_DRAWS, ViewSettings, random_view
from fd_large.engine.evaluation import evaluating
from fd_large.engine.zero.engine import Engine
from fd_large.errors import DataError
from fd_large.tasks.distillation.alignment import Grid, resized
from fd_large.tasks.distillation.constant_prediction import constant_prediction_losses
from fd_large.tasks.distillation.section import MAP
from fd_large.tasks.distillation.task import Distillation

# An epoch that no training reaches, so that crops of training images are unseen ones.
EVALUATION_EPOCH = 2**31 - 1
PANEL_IMAGES = 4
TRIES = 10

log = logging.getLogger(__name__)


class HeldOutViews:
    """The views of one dataset, cut once and kept as uint8 in host memory.

    Args:
        name: Prefix of the metrics.
        source: The images.
        views: Number of views; view v shows image v modulo the number of images.
        settings: How an image becomes a view; its colours stay.
        micro_batch_size: Views per forward.
        seed: Seed of the crops.
        skip_bad: Whether to use the next image for one that cannot be used, as training does.

    Raises: DataError: for an image that cannot be used, unless `skip_bad`.
    """

    def __init__(
        self,
        name: str,
        source: ImageSource,
        *,
        views: int,
        settings: ViewSettings,
        micro_batch_size: int,
        seed: int,
        skip_bad: bool = False,
    ) -> None:
        self.name, self._micro = name, micro_batch_size
        world = distributed.world_size()
        self._mine = np.arange(distributed.rank(), views, world)
        # Under ZeRO-3 every rank must run as many forwards as the one with most views.
        self._rounds = math.ceil(math.ceil(views / world) / micro_batch_size)
        cuts = np.arange(max(views, PANEL_IMAGES))
        draws = uniforms(seed, EVALUATION_EPOCH, cuts, "view", NUM_DRAWS).tolist()
        # Spread over the dataset, which may list its classes one after the other.
        places = np.arange(min(len(cuts), len(source)))
        order = samples_at(source, seed, EVALUATION_EPOCH, places)
        tries = TRIES if skip_bad else 1

        def cut(view: int) -> Tensor:
            for number in range(tries):
                index = int(order[(view + number) % len(order)])
                try:
                    return random_view(source, index, draws[view], settings)
                except DataError as error:
                    if number + 1 == tries:
                        raise
                    log.warning("skipped in evaluation: %s", error)
            raise AssertionError("one try at least")

        mine = [cut(int(view)) for view in self._mine]
        self._images = torch.stack(mine or [cut(0)])
        # The panel shows the same images on any number of ranks.
        self._panel = torch.stack([cut(view) for view in range(PANEL_IMAGES)])

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
            torch.tensor(len(self._mine), dtype=torch.float64, device=distributed.device())
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
        total = task.combined(losses)
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
                yield engine.task.references(**prepared)[number], weight

    def panel(self, engine: Engine) -> dict[str, np.ndarray]:
        """Returns the maps of the first few views: see `feature_panel`."""
        assert isinstance(engine.task, Distillation)
        with evaluating(engine):
            images = self._panel.to(distributed.device())
            maps = feature_panel(engine.task, engine.deepspeed, images)
        return {name: value.numpy() for name, value in maps.items()}

    def _batches(self, engine: Engine) -> Iterator[tuple[dict[str, Any], int, int]]:
        words = f"{self.name.replace('_', ' ')} views"
        for number in activity.counted(range(self._rounds), words, "batches"):
            start = number * self._micro
            images = self._images[start : min(start + self._micro, len(self._mine))]
            weight = 1
            if len(images) == 0:
                images, weight = self._images[:1], 0
            prepared = engine.task.prepare(images.to(distributed.device()), None, None)
            yield prepared, weight, len(images)


def feature_panel(
    task: Distillation, forward: Callable[..., Any], images: Tensor
) -> dict[str, Tensor]:
    """Computes the maps of a few images, without gradient.

    Args:
        task: The task, in evaluation mode.
        forward: Runs the task (its engine).
        images: (n, 3, S, S) uint8, on the device.

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
        prepared = task.prepare(images, None, None)
        forward(**prepared)
        references = task.references(**prepared)
    for handle in handles:
        handle.remove()

    def as_map(tokens: Tensor, grid: Grid) -> Tensor:
        h, w = grid
        return rearrange(tokens[:, tokens.shape[1] - h * w :], "n (h w) c -> n h w c", h=h, w=w)

    own = task.student.grid(*images.shape[-2:])
    maps = {"images": rearrange(images, "n c h w -> n h w c").cpu()}
    for target, reference in zip(task.targets, references, strict=True):
        if target.kind == MAP:
            end = f"_{target.label}" if target.label else ""
            grid, _ = target.given(own, 0)
            places = target.places(own, prepared["maps"][target.teacher].grid)
            maps[f"teacher{end}"] = as_map(reference.cpu(), places)
            tokens = as_map(seen[target.label], grid).flatten(1, 2)
            projected = resized(FeatureMap(tokens, grid, 0), places, antialias=False)
            maps[f"student{end}"] = as_map(projected.tokens, places)
    return maps
