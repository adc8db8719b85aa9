"""Two tasks of image classification: fine-tuning and the official linear probe.

The classifier reads the mean of an image's patch tokens. For a ViT, a new norm of this mean
replaces the ViT's final norm. A Swin model keeps its norm. A timm model may have no norm before its
map, so that it gets a new norm of the mean and also keeps its own norms.

In fine-tuning the whole model learns. Every block has its own copy of a position bias that blocks
shared before (the families' `published.py` make the copies).

In the linear probe a batch norm without affine parameters and one layer learn from the features of
a frozen model. These features are those of fine-tuning before its first step: for a ViT the mean
of the patch tokens before the final norm, normalised without affine parameters; for a Swin model
the mean of its final norm's output. The statistics of the batch norm cover a group of neighbouring
images of the global batch, so that they do not depend on the numbers of ranks and micro-batches.
The running statistics, which tests use, are updated once in each accepted step, by the mean over
all groups.

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
    """Whether a norm of the mean token replaces the model's final norm, as for a ViT."""
    return _kind(model) == "instead"


def norm_of_mean(model: nn.Module) -> LayerNorm | None:
    """Makes the norm of a model's mean token, and removes the final norm of a ViT.

    Args:
        model: A backbone of `fd_large.backbones`, which is changed if it is a ViT.

    Returns: a new norm with weight 1 and bias 0; None for a model that needs no norm of the mean.
    """
    if has_norm_instead(model):
        norm = LayerNorm(model.width, model.norm.eps)
        model.norm = nn.Identity()
        return norm
    return LayerNorm(model.width, NORM_EPS) if _kind(model) == "also" else None


def mean_token(features: FeatureMap, norm: LayerNorm | None) -> Tensor:
    """Returns the mean of the patch tokens, (B, C) float32, normalised if there is a norm.

    Args:
        features: The map of a model that `norm_of_mean` has prepared.
        norm: The result of `norm_of_mean`.
    """
    mean = features.tokens[:, features.num_prefix_tokens :].float().mean(1)
    return mean if norm is None else norm(mean)


def _kind(model: nn.Module) -> str:
    """Returns whether fine-tuning adds a norm of a model's mean token, as a word.

    "instead": a new norm of the mean replaces the model's final norm. "also": the model gets a new
    norm of the mean and keeps its own norms. "none": there is no norm of the mean.
    """
    return getattr(model, "mean_norm", FamilyArchitecture.mean_norm)


class FineTuning(Task):
    """The task of fine-tuning, a backbone and a classifier of its mean token.

    Args:
        student: A backbone of `fd_large.backbones`.
        num_classes: Number of classes, K.
        statistics: Mean and deviation that normalise images, in training and in tests.
        head: Name of the classifier, which is "linear" or names the user's own function or Module
            class of (width, num_classes).
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
        """Returns the arguments of `forward`.

        Args:
            images: (B, 3, H, W), either float32 pixels that are already normalised, as in training,
                or uint8 pixels, as in tests, which are normalised here.
            targets: The targets of `forward`.
            keep: (num_sites, B) bool, the branches that drop path keeps; None keeps all.
        """
        pixels = images if images.is_floating_point() else normalise(images, self.statistics)
        return {"pixels": pixels, "targets": targets, "keep": keep}

    def forward(
        self, *, pixels: Tensor, targets: Tensor, keep: Tensor | None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the cross-entropy, a scalar, and in evaluation the sums of `scores.summed`.

        Args:
            pixels: (B, 3, H, W) float32, normalised.
            targets: In training (B, K) float32, distributions over the classes. In evaluation (B,)
                int64, labels, where images with `NO_LABEL` do not count.
            keep: (num_sites, B) bool, the branches that drop path keeps; None keeps all.
        """
        logits = self.logits(pixels, keep)
        if self.training:
            return -(targets * F.log_softmax(logits, -1)).sum(-1).mean(), {}
        return summed(logits, targets)

    def logits(self, pixels: Tensor, keep: Tensor | None) -> Tensor:
        """Returns the logits of images, (B, K) float32.

        Args:
            pixels: (B, 3, H, W) float32, normalised.
            keep: (num_sites, B) bool, the branches that drop path keeps; None keeps all.
        """
        dtype = next(self.student.parameters()).dtype
        mean = mean_token(self.student(pixels.to(dtype), keep), self.fc_norm)
        return self.head(mean.to(dtype)).float()


class FrozenFeature(nn.Module):
    """A frozen model that maps uint8 images to features, and is always in evaluation mode.

    Args:
        model: A backbone of `fd_large.backbones`.
        statistics: Mean and deviation that normalise images.
        pool: "mean" for the mean of the patch tokens, "cls" for the class token, or "both".

    Raises: ConfigError: if the model has no class token and `pool` asks for it.
    """

    def __init__(self, model: nn.Module, statistics: Statistics, *, pool: str = "mean") -> None:
        super().__init__()
        if pool != "mean" and not model.num_prefix_tokens:
            raise ConfigError(
                "task.linear.pool: the model's map has no class token (timm models leave it out; "
                f"--protocol cached measures it); got {pool}, expected mean. Set "
                "--task.linear.pool mean."
            )
        self.model, self.norm, self.statistics = model, norm_of_mean(model), statistics
        self.pool, self.width = pool, model.width * (2 if pool == "both" else 1)
        self.requires_grad_(False)
        super().train(False)

    def train(self, mode: bool = True) -> FrozenFeature:
        """Keeps the model in evaluation mode, even if `mode` is True; returns this Module."""
        return super().train(False)

    def forward(self, images: Tensor) -> Tensor:
        """Returns the features of images, (B, C) float32, without gradient.

        C is the model's number of channels; with the pool "both" it is twice that number.

        Args:
            images: (B, 3, H, W) uint8.
        """
        with torch.no_grad():
            pixels = normalise(images, self.statistics)
            features = self.model(pixels.to(next(self.model.parameters()).dtype))
            return torch.cat(list(self._pooled(features)), 1)

    def _pooled(self, features: FeatureMap) -> Iterator[Tensor]:
        """Yields one or two pooled tokens of each image, (B, C) float32 each.

        For the pool "mean" it is the mean of the patch tokens, for "cls" the class token, and for
        "both" first the mean and then the class token.

        Args:
            features: The map of the frozen model.
        """
        if self.pool != "cls":
            yield mean_token(features, self.norm)
        if self.pool != "mean":
            # The batch norm that follows undoes any factors and shifts of the final norm.
            token = features.tokens[:, 0].float()
            yield token if self.norm is None else self.norm(token)


class Frozen(NamedTuple):
    """A frozen model in two data types, that of training and that of tests.

    If both data types are float32, the two attributes are the same Module.

    Attributes:
        learning: The model for training, in the run's data type.
        tested: The model for tests, in float32.
    """

    learning: FrozenFeature
    tested: FrozenFeature


class _NothingTrained(nn.Module):
    """A student without parameters, for a task that trains no backbone."""

    drop_path_rates = ()

    def blocks(self) -> list[nn.Module]:
        """Returns an empty list, since there are no blocks."""
        return []

    def no_weight_decay(self) -> frozenset[str]:
        """Returns an empty set, since no parameter is trained."""
        return frozenset()

    def no_weight_decay_keywords(self) -> frozenset[str]:
        """Returns an empty set, since no parameter is trained."""
        return frozenset()


class LinearProbing(Task):
    """The task of the linear probe, a batch norm and a linear layer on a frozen model's features.

    Args:
        frozen: The frozen model. It is not a submodule, so that it is neither trained nor stored.
        num_classes: Number of classes, K.
        norm_batch: Number of images of a group, which share the statistics of the batch norm.
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
        """Returns the arguments of `forward`, for which the frozen model runs on all images.

        Args:
            images: (M, 3, H, W) uint8; in training the images of whole groups, group by group.
            targets: In training {"labels": (B,), "places": (B,)}, the labels of the micro-batch
                and the indices of its images in `images`. In evaluation labels (M,).
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
        """Returns the cross-entropy, a scalar, and in evaluation the sums of `scores.summed`.

        Args:
            features: (M, C) float32.
            labels: (B,) int64, the classes; in evaluation (M,), where images with `NO_LABEL` do not
                count.
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
        """Returns the logits (B, K) float32 of `normed` (B, C), features after the batch norm."""
        return self.head(normed.to(self.head.weight.dtype)).float()

    def before_step(self, progress: float) -> None:
        """Discards statistics that the batch norm has collected and that `after_step` has not used.

        They come from a skipped step, or from forwards that belong to no step.

        Args:
            progress: Not used.
        """
        batch_norm.forget([self])

    def after_step(self) -> None:
        """Updates the running statistics by the step's images; all ranks must call this method."""
        batch_norm.move([self])

    def models(self) -> dict[str, nn.Module]:
        """Returns {"frozen.": the frozen model, "": this task}.

        If a step fails, the layers of both models are listed in a record for diagnosis. A key is
        the prefix that the layers' names get in this record.
        """
        return {"frozen.": self._frozen[0].learning, "": self}


def probe_batch(size: int, image_size: int, *, norm_batch: int) -> Batch:
    """Makes a micro-batch of grey images whose label is the first class.

    Further images without labels make the number of images a multiple of `norm_batch`.

    Args:
        size: Number of labelled images.
        image_size: Side of the images, in pixels.
        norm_batch: Number of images that share the statistics of a batch norm.
    """
    positions, loaded = torch.arange(size), -(-size // norm_batch) * norm_batch
    images = torch.full((loaded, 3, image_size, image_size), 128, dtype=torch.uint8)
    targets = {"labels": torch.zeros(size, dtype=torch.int64), "places": positions}
    return Batch(images, 0, positions, positions, targets=targets)
