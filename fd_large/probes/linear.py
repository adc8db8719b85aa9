"""A linear probe on frozen features: batch norm without affine parameters, then one linear layer.

One layer per learning rate is trained on the same batches, as a batched tensor (R, K, C). With the
learning rate that is best on a held-out tenth of the training images, a new layer is trained on all
training images and tested once.

Source: the probe of He et al. (MAE), arXiv 2111.06377, appendix A.1, as in Feature-Distillation's
linear evaluation: a BatchNorm1d without affine before the layer, momentum .9, no decay.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fd_large.data.sampler import epoch_order
from fd_large.errors import DataError
from fd_large.probes.features import Features
from fd_large.ranks import distributed

log = logging.getLogger(__name__)

MOMENTUM, NORM_EPS = 0.9, 1e-6
HELD_OUT = 10
FEWEST_BATCHES = 4
"""Least number of batches of an epoch, since one batch of all images would be one step an epoch."""
ENOUGH_STEPS = 500
"""Steps below which a probe may have learned too little."""
# Number of rows of a forward outside training.
BLOCK = 8192


@dataclass(frozen=True, kw_only=True)
class Probe:
    """Settings of the linear layer's training.

    Attributes:
        rates: Learning rates to try; each is for batches of 256 and is scaled to the batch size.
        epochs: Passes over the training images.
        batch_size: Largest number of images in a step; a step also has at most a quarter of the
            training images, but at least 2.
        seed: Seed of the held-out tenth and of the order of the images.
    """

    rates: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)
    epochs: int = 30
    batch_size: int = 256
    seed: int = 0


class Outcome(NamedTuple):
    """The result of a linear probe.

    Attributes:
        rate: The best learning rate.
        held_out: Accuracy on the held-out tenth of the training images, in per cent, for each entry
            of `Probe.rates` in the same order.
        predicted: (N,) int64, the predicted class of each test image.
    """

    rate: float
    held_out: tuple[float, ...]
    predicted: NDArray[np.int64]


def evaluate(
    train: Features,
    test: Features,
    *,
    num_classes: int,
    probe: Probe,
    progress: Callable[[int], None] = lambda count: None,
) -> Outcome:
    """Trains and tests linear probes, and returns the result of the best; a collective.

    Every rank makes the same computation, and all return the result of rank 0.

    Args:
        train: Features of the training images.
        test: Features of the test images.
        num_classes: Number of classes, K.
        probe: Settings of the training.
        progress: Called after each training batch with its number of images; the sum of these
            numbers is at most `work`.

    Raises:
        DataError: if fewer than 10 training images have a label, so that none can be held out.
    """
    usable = train.usable()
    order = usable[epoch_order(len(usable), probe.seed, 0, np.arange(len(usable)))]
    count = len(order) // HELD_OUT
    if not count:
        raise DataError(
            f"data.root: too few training images for a probe; got {len(order)}, expected at "
            f"least {HELD_OUT}, one of which is held out. Use more images."
        )
    layers = _fit(train, order[count:], num_classes, probe, probe.rates, progress)
    held_out = [
        100 * float((classes == train.labels[order[:count]]).mean())
        for classes in layers.predict(train, order[:count])
    ]
    best = max(range(len(held_out)), key=lambda place: held_out[place])
    rate = probe.rates[best]
    layer = _fit(train, order, num_classes, probe, (rate,), progress)
    (predicted,) = layer.predict(test, np.arange(len(test.labels)))
    return distributed.broadcast_object(Outcome(rate, tuple(held_out), predicted))


def steps(num_train: int, probe: Probe) -> int:
    """Returns the number of steps, over all epochs, of a probe on `num_train` images.

    Args:
        num_train: Number of training images.
        probe: Settings of the training.
    """
    return probe.epochs * (num_train // _batch_of(num_train, probe))


def warn_of_few_steps(num_train: int, probe: Probe) -> None:
    """Logs a warning if a probe makes fewer than `ENOUGH_STEPS` steps, and so may learn too little.

    Args:
        num_train: Number of training images.
        probe: Settings of the training; `--probe_epochs` are its epochs.
    """
    num_steps = steps(num_train, probe)
    if 0 < num_steps < ENOUGH_STEPS:
        enough = -(-ENOUGH_STEPS * probe.epochs // num_steps)
        log.warning(
            "--probe_epochs: the linear probe makes only %d steps on %d training images and may "
            "have learned too little; with --probe_epochs %d it makes %d",
            num_steps,
            num_train,
            enough,
            enough * num_steps // probe.epochs,
        )


def work(num_train: int, probe: Probe) -> int:
    """Returns an upper bound on the number of images that `evaluate` reports to `progress`.

    The bound counts all training images in each epoch, whereas batches leave out a remainder.

    Args:
        num_train: Number of training images, those of the held-out tenth included.
        probe: Settings of the training.
    """
    return probe.epochs * (num_train - num_train // HELD_OUT + num_train)


class _Layers:
    """One linear layer for each of R learning rates, all after the same batch norm.

    Args:
        num_rates: Number of learning rates, R.
        num_classes: Number of classes, K.
        width: Number of features of an image, C.
    """

    def __init__(self, num_rates: int, num_classes: int, width: int) -> None:
        device = distributed.device()
        self.weight = torch.zeros(num_rates, num_classes, width, device=device)
        self.bias = torch.zeros(num_rates, 1, num_classes, device=device)
        self.mean = torch.zeros(width, device=device)
        self.variance = torch.ones(width, device=device)

    def logits(self, rows: Tensor, *, training: bool) -> Tensor:
        """Maps features `rows`, (B, C), to the logits of all layers, (R, B, K).

        If `training` is True, batch norm normalises by the statistics of the batch, and updates its
        running statistics. Otherwise it normalises by the running statistics.
        """
        normed = F.batch_norm(rows, self.mean, self.variance, training=training, eps=NORM_EPS)
        return torch.baddbmm(self.bias, normed.expand(len(self.weight), -1, -1), self.weight.mT)

    def predict(self, features: Features, numbers: NDArray[np.int64]) -> NDArray[np.int64]:
        """Returns the class that each layer predicts for each chosen image, (R, M) int64.

        Args:
            features: Features of all images.
            numbers: (M,), indices of the chosen images.
        """
        classes = [torch.zeros(len(self.weight), 0, dtype=torch.int64)]
        for start in range(0, len(numbers), BLOCK):
            rows, _ = _read(features, numbers[start : start + BLOCK])
            with torch.no_grad():
                classes.append(self.logits(rows, training=False).argmax(-1).cpu())
        return torch.cat(classes, 1).numpy()


def _fit(
    features: Features,
    numbers: NDArray[np.int64],
    num_classes: int,
    probe: Probe,
    rates: tuple[float, ...],
    progress: Callable[[int], None],
) -> _Layers:
    """Trains one linear layer per learning rate by SGD with momentum, all on the same batches.

    Each learning rate falls to 0 by half a cosine, without warm-up.

    Args:
        features: Features and labels of all images.
        numbers: (M,), indices of the images to train on.
        num_classes: Number of classes, K.
        probe: Settings of the training; its `rates` are not read.
        rates: The R learning rates, for batches of 256 images.
        progress: Called after each batch with its number of images.
    """
    layers = _Layers(len(rates), num_classes, features.rows.shape[1])
    size = _batch_of(len(numbers), probe)
    scale = size / 256
    peak = torch.tensor(rates, device=layers.weight.device).view(-1, 1, 1) * scale
    parameters = [layers.weight.requires_grad_(), layers.bias.requires_grad_()]
    velocities = [torch.zeros_like(parameter) for parameter in parameters]
    updates = steps(len(numbers), probe)
    for update, chosen in enumerate(_batches(len(numbers), size, probe)):
        rows, labels = _read(features, numbers[chosen])
        logits = layers.logits(rows, training=True)
        # A mean for each rate, summed: a layer's gradient depends on its own loss alone.
        losses = F.cross_entropy(logits.flatten(0, 1), labels.repeat(len(rates)), reduction="none")
        gradients = torch.autograd.grad(losses.view(len(rates), -1).mean(1).sum(), parameters)
        rate = peak * 0.5 * (1 + math.cos(math.pi * update / updates))
        with torch.no_grad():
            for parameter, velocity, gradient in zip(
                parameters, velocities, gradients, strict=True
            ):
                velocity.mul_(MOMENTUM).add_(gradient)
                parameter.sub_(rate * velocity)
        progress(len(chosen))
    return layers


def _batch_of(num_rows: int, probe: Probe) -> int:
    # A batch norm cannot train on one image.
    return min(probe.batch_size, max(2, num_rows // FEWEST_BATCHES))


def _batches(num_rows: int, size: int, probe: Probe) -> Iterator[NDArray[np.int64]]:
    for epoch in range(probe.epochs):
        for start in range(0, num_rows - size + 1, size):
            # Epoch 0 has drawn the held-out tenth.
            yield epoch_order(num_rows, probe.seed, epoch + 1, np.arange(start, start + size))


def _read(features: Features, numbers: NDArray[np.int64]) -> tuple[Tensor, Tensor]:
    device = distributed.device()
    rows = torch.from_numpy(features.rows[numbers]).to(device)
    return rows, torch.from_numpy(features.labels[numbers]).to(device)
