"""Makes training batches of labelled images for fine-tuning and for the linear probe.

The view and the mixing partner of an image are functions of (seed, epoch, position). If a
micro-batch has only one of two partners, its rank also loads the other partner.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fd_large.backbones.statistics import Statistics, normalise
from fd_large.data.labelled import LabelledImages
from fd_large.data.loader import Batch, load_at
from fd_large.data.mixing import group_starts, with_partners
from fd_large.data.random_numbers import uniforms
from fd_large.data.views import NUM_DRAWS, ViewSettings, random_view
from fd_large.tasks.classification import augment, mixing
from fd_large.tasks.classification.section import FineTune


class Labelled(NamedTuple):
    """The views at B positions of the epoch's order.

    Attributes:
        images: (B, 3, S, S) uint8; black at a position for which no image could be used.
        indices: (B,) int64, the index of the image at each position; at a black position, the index
            of the last image that was tried.
        labels: (B,) int64, the classes of the images in `indices`.
        bad: For each position, the messages on images that were tried and could not be used.
    """

    images: Tensor
    indices: Tensor
    labels: Tensor
    bad: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class LabelledViews:
    """Loads random views of labelled images; a view is a function of (seed, epoch, position).

    Attributes:
        source: The images.
        settings: Settings of the views.
        seed: The run's seed.
        epoch: Epoch, counted from 0.
    """

    source: LabelledImages
    settings: ViewSettings
    seed: int
    epoch: int

    def load(
        self,
        positions: NDArray[np.int64],
        change: Callable[[Tensor, int], Tensor] = lambda view, place: view,
    ) -> Labelled:
        """Loads the views at some positions.

        Args:
            positions: (B,), positions in the epoch's order.
            change: Function that takes a view (3, S, S) uint8 and its index in `positions`, and
                returns the view to use; by default the same view.
        """
        crops = self.draws(positions, "view", NUM_DRAWS)

        def make(place: int, index: int) -> Tensor:
            return change(random_view(self.source, index, crops[place], self.settings), place)

        loaded = load_at(make, self.source, positions, seed=self.seed, epoch=self.epoch)
        black = torch.zeros(3, *[self.settings.image_size] * 2, dtype=torch.uint8)
        return Labelled(
            torch.stack([black if sample.value is None else sample.value for sample in loaded]),
            torch.tensor([sample.index for sample in loaded]),
            torch.tensor([self.source.label(sample.index) for sample in loaded]),
            tuple(sample.bad for sample in loaded),
        )

    def draws(self, positions: NDArray[np.int64], stream: str, count: int) -> list[list[float]]:
        """Returns uniform random numbers in [0, 1), `count` for each of B positions.

        Args:
            positions: (B,), positions in the epoch's order.
            stream: Name of the stream of random numbers; each name gives different numbers.
            count: Number of random numbers for each position.
        """
        return uniforms(self.seed, self.epoch, positions, stream, count).tolist()


@dataclass(frozen=True)
class MixedBatches(Dataset):
    """Dataset of augmented and mixed images, for fine-tuning.

    Its item for positions (B,) in the epoch's order is a `Batch`. The images of the batch are
    (B, 3, S, S) float32, normalised. The targets are distributions over the classes, (B, K)
    float32. The loading processes use the dataset.

    Attributes:
        source: The images.
        recipe: The recipe's section, with augmentation and mixing.
        statistics: Mean and deviation that normalise the images.
        settings: Settings of the views.
        seed: The run's seed.
        epoch: Epoch, counted from 0.
        global_batch_size: Number of images of a step over all ranks, which are mixed in groups.
    """

    source: LabelledImages
    recipe: FineTune
    statistics: Statistics
    settings: ViewSettings
    seed: int
    epoch: int
    global_batch_size: int

    def __getitem__(self, positions: NDArray[np.int64]) -> Batch:
        """Loads the images at positions (B,) in the epoch's order, augments and mixes them."""
        recipe, batch_size = self.recipe, len(positions)
        every, others = positions, torch.arange(batch_size)
        if recipe.mixup or recipe.cutmix:
            every, others = with_partners(positions, self.global_batch_size)
        views = LabelledViews(self.source, self.settings, self.seed, self.epoch)
        augmentations = views.draws(every, "augmentation", augment.NUM_AUGMENTATION_DRAWS)
        loaded = views.load(every, lambda view, place: self._augmented(view, augmentations[place]))
        images, labels = normalise(loaded.images, self.statistics), loaded.labels
        self._erase(images, views.draws(every, "erasing", augment.NUM_ERASING_DRAWS), every)
        starts = group_starts(positions, self.global_batch_size)
        mixed, targets = [], []
        for first in np.unique(starts).tolist():
            mix = mixing.draw_mix(
                self.seed,
                self.epoch,
                first,
                image_size=self.settings.image_size,
                mixup=recipe.mixup,
                cutmix=recipe.cutmix,
                switch_probability=recipe.switch_probability,
            )
            group = torch.from_numpy(np.flatnonzero(starts == first))
            mixed.append(mixing.mix_images(images[group], images[others[group]], mix))
            targets.append(
                mixing.mix_labels(
                    labels[group],
                    labels[others[group]],
                    mix,
                    num_classes=len(self.source.classes),
                    smoothing=recipe.smoothing,
                )
            )
        return Batch(
            torch.cat(mixed),
            self.epoch,
            torch.from_numpy(positions),
            loaded.indices[:batch_size],
            sum(loaded.bad[:batch_size], ()),
            torch.cat(targets),
        )

    def _augmented(self, view: Tensor, draws: list[float]) -> Tensor:
        """Returns a view after RandAugment, or unchanged if the recipe sets `randaugment` to 0.

        Args:
            view: (3, S, S) uint8.
            draws: `NUM_AUGMENTATION_DRAWS` random numbers in [0, 1).
        """
        if self.recipe.randaugment == 0:
            return view
        return augment.augment(
            view,
            draws,
            magnitude=self.recipe.randaugment,
            std=self.recipe.randaugment_std,
            statistics=self.statistics,
        )

    def _erase(
        self, pixels: Tensor, draws: list[list[float]], positions: NDArray[np.int64]
    ) -> None:
        """Fills a box of some images with standard normal noise, in place.

        Args:
            pixels: (B, 3, S, S) float32, normalised.
            draws: For each image, `NUM_ERASING_DRAWS` random numbers in [0, 1), which decide if a
                box is filled, and which box.
            positions: (B,), positions in the epoch's order, on which the noise depends.
        """
        for place, position in enumerate(positions.tolist()):
            box = augment.erasing_box(
                *pixels.shape[-2:], draws[place], probability=self.recipe.erasing
            )
            if box is None:
                continue
            top, left, rows, columns = box
            pairs = uniforms(
                self.seed, self.epoch, [position], "erasing_noise", 6 * rows * columns
            )[0].reshape(3, rows, columns, 2)
            noise = augment.normals(pairs[..., 0], pairs[..., 1])
            pixels[place, :, top : top + rows, left : left + columns] = torch.from_numpy(noise)


@dataclass(frozen=True)
class GroupedBatches(Dataset):
    """Dataset of whole groups of images, for the linear probe.

    Its item for positions (B,) in the epoch's order is a `Batch`. The images of the batch,
    (M, 3, S, S) uint8, are those of every group that has any of the positions, group by group. If a
    micro-batch ends inside a group, two ranks or micro-batches load the whole group. The loading
    processes use the dataset.

    Attributes:
        views: Loads the views.
        group: Number of images of a group; positions k*group to (k+1)*group - 1 form a group.
    """

    views: LabelledViews
    group: int

    def __getitem__(self, positions: NDArray[np.int64]) -> Batch:
        """Loads all groups that have any of the positions (B,), and the labels of the positions."""
        starts = np.unique(positions // self.group) * self.group
        every = (starts[:, None] + np.arange(self.group)).ravel()
        loaded = self.views.load(every)
        places = torch.from_numpy(np.searchsorted(every, positions))
        return Batch(
            loaded.images,
            self.views.epoch,
            torch.from_numpy(positions),
            loaded.indices[places],
            sum((loaded.bad[place] for place in places.tolist()), ()),
            {"labels": loaded.labels[places], "places": places},
        )
