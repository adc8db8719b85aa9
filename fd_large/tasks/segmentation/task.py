"""The segmentation task: a head on a student's maps predicts the class of each pixel.

A Swin model provides a map for each stage. For a ViT, the maps of four blocks are rescaled. In
training, a small auxiliary head on the third map adds a second loss.

Sources: the published segmentation of Swin (arXiv 2103.14030) and BEiT (arXiv 2106.08254).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fd_large.backbones.statistics import IMAGENET, Statistics
from fd_large.data.random_numbers import uniforms
from fd_large.engine.heads import make_head
from fd_large.tasks.dense.pixels import normalised
from fd_large.tasks.dense.stages import (
    blocks_taken,
    features,
    has_stages,
    maps_of_blocks,
    neck_of,
    normed_last_map,
    strip,
    to_pixels,
)
from fd_large.tasks.dense.target import Targets
from fd_large.tasks.dense.task import DenseTask
from fd_large.tasks.segmentation.heads.classifier import DROPOUT
from fd_large.tasks.segmentation.heads.fcn_head import FcnHead
from fd_large.tasks.segmentation.heads.linear_head import LinearHead
from fd_large.tasks.segmentation.heads.uper_head import UperHead
from fd_large.tasks.segmentation.loss import Pixels, pixel_loss
from fd_large.tasks.segmentation.section import ON_LAST_MAP

HEADS: dict[str, Callable[..., nn.Module]] = {
    "uper": UperHead,
    "linear": lambda widths, width, num_classes: LinearHead(widths[-1], num_classes),
}
"""Built-in heads, by their names in a recipe (`task.segmentation.head`). Each is constructed from
(channels of the maps, channels of the head, number of classes), and returns logits for the maps.
The attribute `width` of a head is the number of channels before its last layer, on which dropout
acts."""
AUXILIARY_MAP, AUXILIARY_WIDTH = 2, 256


class Segmentation(DenseTask):
    """A distilled student with a head that predicts the class of each pixel.

    Args:
        student: A backbone. Its final norm is removed, unless the head is linear.
        num_classes: Number of classes, K.
        head: A name in the table `HEADS`, or a head of the user's own (`module:FILE.py:NAME`).
        width: Channels of the head.
        auxiliary_weight: Weight of the auxiliary head's loss; 0 for no auxiliary head.
        over: Divisor of the losses (`pixel_loss`): "all" for the number of pixels, "labelled" for
            the number of labelled pixels.
        frozen: Whether the student is frozen.
        seed: Seed of channel dropout, which also depends on the epoch and on the position of an
            image in the epoch's order.
        statistics: Mean and deviation that normalise the student's pixels.

    Raises: ConfigError: for an unknown name, or a student that cannot carry the head.
    """

    def __init__(
        self,
        student: nn.Module,
        num_classes: int,
        *,
        head: str = "uper",
        width: int = 512,
        auxiliary_weight: float = 0.4,
        over: Pixels = "all",
        frozen: bool = False,
        seed: int = 0,
        statistics: Statistics = IMAGENET,
    ) -> None:
        super().__init__(student, frozen=frozen, statistics=statistics)
        self.neck: nn.Module | None = None
        widths: tuple[int, ...] = (student.width,)
        self.on_last_map = head in ON_LAST_MAP
        if not self.on_last_map:
            strip(student, windowed=False)
            self.neck, widths = neck_of(student)
        self.head = make_head(
            head,
            widths,
            width,
            num_classes,
            built_in=HEADS,
            where="task.segmentation.head",
        )
        self.auxiliary: FcnHead | None = None
        if auxiliary_weight:
            self.auxiliary = FcnHead(widths[AUXILIARY_MAP], AUXILIARY_WIDTH, num_classes)
        self.auxiliary_weight, self.over, self.seed = auxiliary_weight, over, seed

    def prepare(self, images: Tensor, targets: Targets, keep: Tensor | None) -> dict[str, Any]:
        """Returns the arguments of `forward`: normalised pixels, labels, and masks of dropout.

        Args:
            images: (B, 3, H, W) uint8, padded at the right and the bottom, on the device.
            targets: The targets of the batch, with the label of each pixel.
            keep: (num_sites, B) bool, the branches that drop path keeps; None keeps all.
        """
        count = self.head.width + (self.auxiliary.width if self.auxiliary else 0)
        draws = uniforms(self.seed, targets.epoch, targets.positions, "dropout", count)
        return {
            "pixels": normalised(images, targets.sizes, self.statistics),
            "keep": keep,
            "labels": targets.truth,
            "channels": torch.from_numpy(draws >= DROPOUT).to(images.device),
        }

    def forward(
        self,
        *,
        pixels: Tensor,
        keep: Tensor | None = None,
        labels: Tensor | None = None,
        channels: Tensor | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]] | Tensor:
        """Returns the loss and its terms, or the logits of all pixels if no labels are given.

        Args:
            pixels: (B, 3, H, W) float32, normalised for the student.
            keep: (num_sites, B) bool, the branches that drop path keeps; None keeps all.
            labels: (B, H, W), classes or `IGNORED`.
            channels: (B, width of the head + width of the auxiliary head) bool, the channels that
                dropout keeps before the classifiers; None keeps all.

        Returns: if `labels` is not None, (loss, {name: term}), scalars. The terms are "decode", and
            "auxiliary" if there is an auxiliary head. If `labels` is None, the logits,
            (B, K, H, W) float32.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            maps = self._maps(pixels, keep)
        if self.neck is not None:
            maps = self.neck(maps)
        if labels is None:
            return to_pixels(self.student, self.head(maps, None).float(), pixels)
        of_head = of_auxiliary = None
        if channels is not None:
            of_head, of_auxiliary = channels.tensor_split((self.head.width,), dim=1)
        terms = {"decode": pixel_loss(self.head(maps, of_head), labels, over=self.over)}
        if self.auxiliary is not None:
            logits = self.auxiliary(maps[AUXILIARY_MAP], of_auxiliary)
            loss = pixel_loss(logits, labels, over=self.over)
            terms["auxiliary"] = self.auxiliary_weight * loss
        return sum(terms.values()), {name: term.detach() for name, term in terms.items()}

    def _maps(self, pixels: Tensor, keep: Tensor | None) -> Any:
        """Returns the student's maps, which the neck or the head reads.

        For a linear head, which has no neck, they are [last map after the final norm (B, C, h, w)].
        Otherwise they are the maps (B, h, w, C) of all stages of a student with stages, or of four
        blocks of a ViT.

        Args:
            pixels: (B, 3, H, W) float32, normalised for the student.
            keep: (num_sites, B) bool, the branches that drop path keeps; None keeps all.
        """
        if self.on_last_map:
            return [normed_last_map(self.student, pixels, keep)]
        if has_stages(self.student):
            return features(self.student, pixels, keep)
        taken = blocks_taken(self.student.depths[0])
        return maps_of_blocks(self.student, pixels, keep, taken)

    def no_weight_decay(self) -> tuple[frozenset[str], tuple[str, ...]]:
        """Returns (parameter names, substrings of names) that are exempt from weight decay.

        One-dimensional parameters are always exempt and are not named. A student with several
        stages names its other exempt parameters itself. For a ViT both parts of the result are
        empty, so that weight decay acts on the class token and the position embedding, as in the
        published runs. (Their code looks for both names without the backbone's prefix, and so does
        not find them.)
        """
        if has_stages(self.student):
            return super().no_weight_decay()
        return frozenset(), ()
