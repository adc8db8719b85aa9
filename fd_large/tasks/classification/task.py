"""Two tasks of image classification: fine-tuning and the official linear probe.

The classifier reads the mean of an image's patch tokens. For a ViT, a new norm normalises this
mean and replaces the ViT's final norm. A Swin model keeps its norm. The map of a timm model may
have passed no norm, so that its mean is normalised too, and the model's own norms stay.

In fine-tuning the whole model learns. Every block has its own copy of a position bias that blocks
shared before (the families' `published.py` make the copies).

In the linear probe a batch norm without affine parameters and one layer learn from the features of
a frozen model. These features are those of fine-tuning before its first step: for a ViT the mean
of the patch tokens before the final norm, normalised without affine parameters; for a Swin model
the mean of its final norm's output. The statistics of the batch norm cover a group of neighbouring
images of the global batch, so that they do not depend on ranks and micro batches. The running
statistics, used in tests, are updated once in each accepted step, by the mean over all groups.

Sources: the official code of SwinTransformer/Feature-Distillation (models/vision_transformer.py,
models/swin_transformer_v2.py, main_finetune.py, main_linear.py), whose probe is that of He et al.
(MAE), arXiv 2111.06377, appendix A.1. In that code a group is the batch of a GPU, the running
statistics of the first GPU are used in tests, and a configured drop path of the frozen model is on
in training; here it is off.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.backbones import batch_norm
from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.initialization import NORMAL
from fd_large.backbones.layers import LayerNorm, Linear
from fd_large.backbones.statistics import Statistics, normalise
from fd_large.data.loader import Batch
from fd_large.engine.heads import make_head
from fd_large.engine.task import Task
from fd_large.errors import ConfigError
from fd_large.recipes.family import FamilyArchitecture
from fd_large.tasks.classification.scores import summed

# As published for ViTs; the predictions for all images are nearly equal at first.
HEAD_SCALE = 1e-3
# The field of the recipe that names the classifier.
HEAD = "task.finetune.head"
NORM_EPS = 1e-6
# The published standard deviation of the layer's first weights.
HEAD_STD = 0.01


def has_norm_instead(model: nn.Module) -> bool:
    """Returns whether a norm of the mean token replaces a model's final norm."""
    return _kind(model) == "instead"


def norm_of_mean(model: nn.Module) -> LayerNorm | None:
    """Makes the norm of a model's mean token, and removes a ViT's final norm.

    Args:
        model: A backbone of `fd_large.backbones`.

    Returns: a new norm, whose weight is 1 and bias 0; None for a model that keeps its own norm.
    """
    if has_norm_instead(model):
        norm = LayerNorm(model.width, model.norm.eps)
        model.norm = nn.Identity()
        return norm
    return LayerNorm(model.width, NORM_EPS) if _kind(model) == "also" else None


def mean_token(features: FeatureMap, norm: LayerNorm | None) -> Tensor:
    """Returns the mean of the patch tokens, after `norm` if there is one, (B, C) float32.

    Args:
        features: The map of a model that `norm_of_mean` has prepared.
        norm: Result of `norm_of_mean`.
    """
    mean = features.tokens[:, features.num_prefix_tokens :].float().mean(1)
    return mean if norm is None else norm(mean)


def _kind(model: nn.Module) -> str:
    return getattr(model, "mean_norm", FamilyArchitecture.mean_norm)


class FineTuning(Task):
    """A backbone and a classifier of its mean token, by default linear.

    Args:
        student: A backbone of `fd_large.backbones`.
        num_classes: K.
        statistics: The normalisation of its images, in training and in tests.
        head: Name of the classifier of the mean token: "linear", or the user's own, a function or
            Module class of (width, num_classes).
    """

    def __init__(
        self,
        student: nn.Module,
        num_classes: int,
        *,
        statistics: Statistics,
        head: str = "linear",
    ) -> None:
        super().__init__(student)
        self.statistics = statistics
        self.fc_norm = norm_of_mean(student)
        draw = NORMAL.divided(1 / HEAD_SCALE) if has_norm_instead(student) else NORMAL
        heads = {"linear": partial(Linear, draw=draw)}
        self.head = make_head(head, student.width, num_classes, built_in=heads, where=HEAD)

    def prepare(self, images: Tensor, targets: Any, keep: Tensor | None) -> dict[str, Any]:
        """Returns the pixels, normalised if they are still uint8, and the targets."""
        pixels = images if images.is_floating_point() else normalise(images, self.statistics)
        return {"pixels": pixels, "targets": targets, "keep": keep}

    def forward(
        self, *, pixels: Tensor, targets: Tensor, keep: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the cross-entropy and, in evaluation, sums over the images and `predicted`, (B,).

        Args:
            pixels: (B, 3, H, W) float32, normalised.
            targets: (B, K) float32, distributions; in evaluation (B,) int64, labels, where
                images with `NO_LABEL` are not counted.
            keep: (num_sites, B) bool, or None.
        """
        logits = self.logits(pixels, keep)
        if self.training:
            return -(targets * F.log_softmax(logits, -1)).sum(-1).mean(), {}
        return summed(logits, targets)

    def logits(self, pixels: Tensor, keep: Tensor | None) -> Tensor:
        """Returns logits, (B, K) float32."""
        dtype = next(self.student.parameters()).dtype
        mean = mean_token(self.student(pixels.to(dtype), keep), self.fc_norm)
        return self.head(mean.to(dtype)).float()


class FrozenFeature(nn.Module):
    """A frozen model that maps uint8 images to their features, always in evaluation mode.

    Args:
        model: A backbone of `fd_large.backbones`.
        statistics: The normalisation of its images.
        pool: "mean" for the mean of the patch tokens, "cls" for the class token, or "both".

    Raises: ConfigError: if the model has no class token and `pool` asks for it.
    """

    def __init__(self, model: nn.Module, statistics: Statistics, *, pool: str = "mean") -> None:
        super().__init__()
        if pool != "mean" and not model.num_prefix_tokens:
            raise ConfigError(
                "task.linear.pool: the model's map has no class token (that of a timm model leaves "
                f"it out, and --protocol cached measures it); got {pool}, expected mean. Set "
                "--task.linear.pool mean."
            )
        self.model, self.norm, self.statistics = model, norm_of_mean(model), statistics
        self.pool, self.width = pool, model.width * (2 if pool == "both" else 1)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> FrozenFeature:
        """Stays in evaluation mode, whatever the argument."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Returns features, (B, C) float32, without gradient."""
        with torch.no_grad():
            pixels = normalise(images, self.statistics)
            features = self.model(pixels.to(next(self.model.parameters()).dtype))
            return torch.cat(list(self._pooled(features)), 1)

    def _pooled(self, features: FeatureMap) -> Iterator[Tensor]:
        if self.pool != "cls":
            yield mean_token(features, self.norm)
        if self.pool != "mean":
            # The batch norm that follows undoes any factors and shifts of the final norm.
            token = features.tokens[:, 0].float()
            yield token if self.norm is None else self.norm(token)


class Frozen(NamedTuple):
    """A frozen model in two data types; on a CPU both are the same.

    Attributes:
        learning: The model for training, in the run's data type.
        tested: The model for tests, in float32.
    """

    learning: FrozenFeature
    tested: FrozenFeature


class _NothingTrained(nn.Module):
    """A model without parameters, which takes the place of the student in other tasks."""

    drop_path_rates = ()

    def blocks(self) -> list[nn.Module]:
        return []

    def no_weight_decay(self) -> frozenset[str]:
        return frozenset()

    def no_weight_decay_keywords(self) -> frozenset[str]:
        return frozenset()


class LinearProbing(Task):
    """The linear layer and the norm before it.

    Args:
        frozen: The model; it is no submodule, so that it is neither trained nor stored.
        num_classes: K.
        norm_batch: Images of a group.
    """

    momentum = batch_norm.MOMENTUM

    def __init__(self, frozen: Frozen, num_classes: int, *, norm_batch: int) -> None:
        super().__init__(_NothingTrained())
        self._frozen, self._norm_batch = (frozen,), norm_batch
        width = frozen.tested.width
        draw = NORMAL.divided(NORMAL.std / HEAD_STD)
        self.head = Linear(width, num_classes, draw=draw)
        self.register_buffer("running_mean", torch.zeros(width))
        self.register_buffer("running_var", torch.ones(width))
        # Sums over this step's images of the mean and variance of their groups, and their number.
        self.seen: Tensor | None = None

    def prepare(self, images: Tensor, targets: Any, keep: Tensor | None) -> dict[str, Any]:
        """Returns features, labels and, in training, the indices of this micro batch's images.

        Args:
            images: (M, 3, H, W) uint8; in training whole groups, one after the other.
            targets: In training {"labels": (B,), "places": (B,)}, the labels of the micro batch
                and the indices of its images in `images`; else labels (M,).
            keep: Not used, since the frozen model has no drop path.
        """
        del keep
        (frozen,) = self._frozen
        if not self.training:
            return {"features": frozen.tested(images), "labels": targets, "places": None}
        return {"features": frozen.learning(images), **targets}

    def forward(
        self, *, features: Tensor, labels: Tensor, places: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the cross-entropy and, in evaluation, sums over the images.

        Args:
            features: (M, C) float32.
            labels: (B,) int64; in evaluation, see `scores.summed`.
            places: (B,) int64, the row in `features` of each label; None in evaluation, where all
                rows have labels.
        """
        if places is None:
            mean, variance = self.running_mean, self.running_var
            normed = (features - mean) * (variance + NORM_EPS).rsqrt()
            return summed(self._logits(normed), labels)
        rows, groups = [], features.split(self._norm_batch)
        numbers = torch.arange(len(groups), device=places.device)
        counts = (places // self._norm_batch == numbers[:, None]).sum(1)
        for count, group in zip(counts, groups, strict=True):
            variance, mean = torch.var_mean(group, 0, correction=0)
            rows.append((group - mean) * (variance + NORM_EPS).rsqrt())
            unbiased = variance * (len(group) / max(1, len(group) - 1))
            ones = torch.ones(1, device=mean.device)
            sums = count * torch.cat([mean, unbiased, ones]).double()
            self.seen = sums if self.seen is None else self.seen + sums
        logits = self._logits(torch.cat(rows)[places])
        return F.cross_entropy(logits, labels), {}

    def _logits(self, normed: Tensor) -> Tensor:
        """Maps features (B, C) to logits (B, K) float32."""
        return self.head(normed.to(self.head.weight.dtype)).float()

    def before_step(self, progress: float) -> None:
        """Drops statistics seen outside of a step, such as in a trial."""
        batch_norm.forget([self])

    def after_step(self) -> None:
        """Updates the running statistics."""
        batch_norm.move([self])

    def models(self) -> dict[str, nn.Module]:
        """Returns the frozen model and this task."""
        return {"frozen.": self._frozen[0].learning, "": self}


def probe_batch(size: int, image_size: int, *, norm_batch: int) -> Batch:
    """Makes a micro batch of grey images of the first class.

    Images without labels follow until the number of images is a multiple of `norm_batch`.

    Args:
        size: Number of labelled images.
        image_size: Side of the images, in pixels.
        norm_batch: Number of images that share the statistics of a batch norm.
    """
    positions, loaded = torch.arange(size), -(-size // norm_batch) * norm_batch
    images = torch.full((loaded, 3, image_size, image_size), 128, dtype=torch.uint8)
    targets = {"labels": torch.zeros(size, dtype=torch.int64), "places": positions}
    return Batch(images, 0, positions, positions, targets=targets)
