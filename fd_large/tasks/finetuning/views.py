"""Labelled images to batches that are mixed and augmented, for training.

What happens to an image in training is a function of (seed, epoch, position), and so is the image
that it is mixed with: a rank whose micro batch ends between two partners loads the other one too.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from fd_large.backbones.statistics import Statistics, normalise
from fd_large.data import views
from fd_large.data.labelled import LabelledImages
from fd_large.data.loader import Batch, load_samples
from fd_large.data.random_numbers import uniforms
from fd_large.data.sampler import samples_at
from fd_large.tasks.finetuning import augment, mixing
from fd_large.tasks.finetuning.section import FineTune


@dataclass(frozen=True)
class TrainingBatches(Dataset):
    """Positions of a micro batch to a `Batch`; runs in the workers.

    Its images are (B, 3, S, S) float32, normalised, its targets (B, K) float32 distributions over
    the classes.

    Attributes:
        source: The images.
        recipe: Augmentation and mixing.
        statistics: Mean and deviation by which the images are normalised.
        settings: How an image becomes a view.
        seed: The run's seed.
        epoch: Epoch, counted from 0.
        global_batch_size: Images a step over all ranks; they are mixed among each other.
    """

    source: LabelledImages
    recipe: FineTune
    statistics: Statistics
    settings: views.ViewSettings
    seed: int
    epoch: int
    global_batch_size: int

    def __getitem__(self, positions: NDArray[np.int64]) -> Batch:
        """Loads, augments and mixes."""
        recipe, own, other = self.recipe, len(positions), positions
        if recipe.mixup or recipe.cutmix:
            other = mixing.partners(positions, self.global_batch_size)
        every = np.concatenate([positions, np.setdiff1d(other, positions)])
        images, indices, labels, bad = self._views(every, own)
        at = {position: place for place, position in enumerate(every.tolist())}
        others = torch.tensor([at[position] for position in other.tolist()])
        starts = mixing.group_starts(positions, self.global_batch_size)
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
            indices[:own],
            bad,
            torch.cat(targets),
        )

    def _views(
        self, positions: NDArray[np.int64], own: int
    ) -> tuple[Tensor, Tensor, Tensor, tuple[str, ...]]:
        """Images, samples, labels; and what was bad among the first `own`, a rank's to count."""
        crops = self._draws(positions, "view", views.NUM_DRAWS)
        augmentations = self._draws(positions, "augmentation", augment.NUM_AUGMENTATION_DRAWS)
        loaded = load_samples(
            lambda place, index: self._view(index, crops[place], augmentations[place]),
            positions,
            samples_at(self.source, self.seed, self.epoch, positions),
            num_samples=len(self.source),
            seed=self.seed,
            epoch=self.epoch,
            blocks=getattr(self.source, "blocks", None),
        )
        black = torch.zeros(3, *[self.settings.image_size] * 2, dtype=torch.uint8)
        images = [black if sample.value is None else sample.value for sample in loaded]
        indices = [sample.index for sample in loaded]
        labels = torch.tensor([self.source.label(index) for index in indices])
        bad = sum((sample.bad for sample in loaded[:own]), ())
        pixels = normalise(torch.stack(images), self.statistics)
        self._erase(pixels, positions)
        return pixels, torch.tensor(indices), labels, bad

    def _view(self, index: int, crop: list[float], augmentation: list[float]) -> Tensor:
        view = views.random_view(self.source, index, crop, self.settings)
        if self.recipe.randaugment == 0:
            return view
        return augment.augment(
            view,
            augmentation,
            magnitude=self.recipe.randaugment,
            std=self.recipe.randaugment_std,
            statistics=self.statistics,
        )

    def _erase(self, pixels: Tensor, positions: NDArray[np.int64]) -> None:
        """Fills a box of some images with standard normal noise, in place."""
        draws = self._draws(positions, "erasing", augment.NUM_ERASING_DRAWS)
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

    def _draws(self, positions: NDArray[np.int64], stream: str, count: int) -> list[list[float]]:
        return uniforms(self.seed, self.epoch, positions, stream, count).tolist()
