"""Cascade Mask R-CNN: three box heads in sequence, with rising IoU thresholds.

Two published forms train differently, and compute different scores from the same weights:

mmdet: Every stage draws its own sample from its input boxes and the objects' boxes, has half the
loss weight of the previous stage, and has its own mask head. In a test, class scores are the
softmax of the stages' mean logits, and masks are the mean of the heads' probabilities. The units of
the last stage's box deltas are 0.033 (centre) and 0.067 (size).

detectron2: The first stage draws a sample, and the other stages match the refined boxes of this
sample to the objects again. Stages have equal loss weights, and the gradient of each is scaled by a
third at the pooled box features. A single mask head learns from the first sample. In a test, class
scores are the mean of the stages' probabilities. The units of the last stage's box deltas are 1/30
and 1/15.

Both forms use ViTDet's layers with LayerNorm here. mmdetection's own heads have no norm (two
linear layers) or batch statistics, which would depend on the rest of the batch.

Every call runs the same modules in the same order on all ranks, also in stages without positives.

Sources: Cai and Vasconcelos, arXiv 1712.00726; mmdetection 3.3 (roi_heads/cascade_roi_head.py);
detectron2 (modeling/roi_heads/cascade_rcnn.py) as ViTDet uses it, Li et al., arXiv 2203.16527.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fd_large.tasks.detection.data.target import Target
from fd_large.tasks.detection.heads import box_coder
from fd_large.tasks.detection.heads.box_head import (
    BOX_SIDE,
    BoxHead,
    BoxLoss,
    Sampled,
    box_losses,
    deltas_of,
    match_rois,
    most_sampled,
    sample_rois,
)
from fd_large.tasks.detection.heads.mask_head import (
    MASK_SIDE,
    MaskHead,
    Taught,
    mask_loss,
    mean_masks,
    most_taught,
    taught,
)
from fd_large.tasks.detection.heads.pooling import pool
from fd_large.tasks.detection.heads.roi_heads import Candidates, Terms, of_images
from fd_large.tasks.detection.heads.rpn import cut_to

POSITIVE_IOUS = (0.5, 0.6, 0.7)
NUM_STAGES = len(POSITIVE_IOUS)

FormName = Literal["mmdet", "detectron2"]


class Form(NamedTuple):
    """The settings in which the two published forms of the cascade differ.

    Attributes:
        coders: Box coder of each stage, which defines the units of its deltas.
        loss_weights: Weight of the losses of each stage.
        samples_again: True if every stage draws its own sample and has its own mask head, False if
            all stages share the first stage's sample and mask head.
        gradient_scale: Factor of a stage's gradient at the pooled box features.
        averages_logits: True if a test averages the logits of the stages, False if it averages
            the probabilities.
    """

    coders: tuple[Any, ...]
    loss_weights: tuple[float, ...]
    samples_again: bool
    gradient_scale: float
    averages_logits: bool


FORMS: dict[FormName, Form] = {
    "mmdet": Form(box_coder.MMDET, (1.0, 0.5, 0.25), True, 1.0, True),
    "detectron2": Form(box_coder.DETECTRON2, (1.0, 1.0, 1.0), False, 1 / NUM_STAGES, False),
}


class Stage(NamedTuple):
    """The output of a box head for its rois.

    Attributes:
        rois: (n, 4) float32 for each image: left, top, right, bottom in pixels.
        logits: (R, K + 1) float32. R is the number of rois, or 1 if there are none.
        deltas: (R, K, 4) float32, or (R, 1, 4) if class-agnostic.
    """

    rois: Sequence[Tensor]
    logits: Tensor
    deltas: Tensor


class Features(NamedTuple):
    """The maps from which the features of boxes are pooled.

    Attributes:
        maps: Levels of the pyramid, finest first.
        strides: Stride of each level, in pixels.
        semantic: Logits and embedding from the `SemanticBranch`; None in heads without a branch.
    """

    maps: Sequence[Tensor]
    strides: Sequence[float]
    semantic: tuple[Tensor, Tensor] | None = None


class CascadeHeads(nn.Module):
    """Three box heads in sequence, with a mask head for each stage or a single mask head.

    Args:
        num_classes: Number of classes, K.
        width: Channels of the pyramid and the heads.
        rois_per_image: Number of proposals sampled from each image for the losses.
        form: A name in the table `FORMS`.
        box_loss: Kind of box loss (`box_losses`).
        class_agnostic: True if a proposal has a single box for all classes, False if it has a box
            for each class.
    """

    # Whether a stage's mask head learns from a sample of the stage's refined boxes; else from the
    # sample of its input boxes.
    interleaved = False
    # Whether an object is matched to the proposal that overlaps it most (`sample_rois`).
    best_for_each = False

    def __init__(
        self,
        num_classes: int,
        width: int,
        *,
        rois_per_image: int,
        form: FormName = "mmdet",
        box_loss: BoxLoss = "smooth_l1",
        class_agnostic: bool = True,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.rois_per_image = rois_per_image
        self.form, self.box_loss = FORMS[form], box_loss
        self.boxes = nn.ModuleList(
            BoxHead(num_classes, width, class_agnostic=class_agnostic) for _ in range(NUM_STAGES)
        )
        num_masks = NUM_STAGES if self.form.samples_again else 1
        self.mask_heads = nn.ModuleList(MaskHead(num_classes, width) for _ in range(num_masks))

    @property
    def samples_per_image(self) -> int:
        """Number of samples, of up to `rois_per_image` boxes each, that `terms` draws per image."""
        samples = NUM_STAGES if self.form.samples_again else 1
        return 2 * samples if self.interleaved else samples

    @property
    def draws_per_image(self) -> int:
        """Number of uniform random numbers that `terms` needs for each image."""
        return 2 * self.rois_per_image * self.samples_per_image

    def terms(
        self,
        maps: Sequence[Tensor],
        strides: Sequence[float],
        proposals: Sequence[Tensor],
        sizes: Tensor,
        targets: Sequence[Target],
        draws: NDArray,
    ) -> Terms:
        """Computes the losses on proposals sampled from each image.

        Stage N of the three has the losses "cls_N" and "box_N", and mask head N has "mask_N". A
        semantic branch adds "semantic".

        Args:
            maps: Levels of the pyramid, finest first.
            strides: Stride of each level, in pixels.
            proposals: (n, 4) float32 for each image: left, top, right, bottom in pixels; n may
                be 0.
            sizes: (B, 2), height and width of each image without its padding.
            targets: The target of each image.
            draws: (B, draws_per_image) uniform random numbers in [0, 1).

        Returns: {name of the loss: (the loss summed over the samples, number of samples)}.
        """
        features = self._features(maps, strides)
        terms = {**self._semantic_terms(features, targets)}
        samples = iter(draws.reshape(len(draws), self.samples_per_image, -1).swapaxes(0, 1))
        for number, positive_iou in enumerate(POSITIVE_IOUS):
            if number == 0 or self.form.samples_again:
                sampled = self._sample(proposals, targets, next(samples), positive_iou)
            else:
                sampled = match_rois(
                    proposals, targets, num_classes=self.num_classes, positive_iou=positive_iou
                )
            stage = self._stage(number, features, sampled.rois)
            terms |= self._box_terms(number, stage, sampled)
            if number < NUM_STAGES - 1 or self.interleaved:
                proposals = self._handed_on(number, stage, sampled, proposals, sizes)
            if self.interleaved:
                sampled = self._sample(proposals, targets, next(samples), positive_iou)
            if number < len(self.mask_heads):
                terms |= self._mask_terms(number, features, taught(sampled, targets))
        return terms

    def shapes_only(self, maps: Sequence[Tensor], strides: Sequence[float]) -> Tensor:
        """Returns the sum of the losses on the largest possible sample, to count FLOPs and memory.

        Args:
            maps: Levels of the pyramid, finest first; may be on the meta device.
            strides: Stride of each level, in pixels.
        """
        features = self._features(maps, strides)
        terms = {**self._semantic_terms(features, [])}
        sampled = most_sampled(len(maps[0]), self.rois_per_image, maps[0])
        for number in range(NUM_STAGES):
            stage = self._stage(number, features, sampled.rois)
            terms |= self._box_terms(number, stage, sampled)
            if number < len(self.mask_heads):
                terms |= self._mask_terms(number, features, most_taught(sampled))
        return torch.stack([total for total, _ in terms.values()]).sum()

    def candidates(
        self,
        maps: Sequence[Tensor],
        strides: Sequence[float],
        proposals: Sequence[Tensor],
        sizes: Tensor,
    ) -> list[Candidates]:
        """Returns the refined boxes and class scores of each image's proposals, before selection.

        Args:
            maps: Levels of the pyramid, finest first.
            strides: Stride of each level, in pixels.
            proposals: (n, 4) float32 for each image: left, top, right, bottom in pixels; n may
                be 0.
            sizes: (B, 2), height and width of each image without its padding.
        """
        features = self._features(maps, strides)
        counts, all_logits = [len(proposal) for proposal in proposals], []
        for number in range(NUM_STAGES):
            stage = self._stage(number, features, proposals)
            all_logits.append(stage.logits[: sum(counts)])
            if number < NUM_STAGES - 1:
                proposals = self._refined(number, stage, all_logits[-1][:, :-1].argmax(1), sizes)
        logits = torch.stack(all_logits)
        if self.form.averages_logits:
            scores = logits.mean(0).softmax(dim=1)
        else:
            scores = logits.softmax(dim=2).mean(0)
        deltas = stage.deltas[: sum(counts)].flatten(1)
        boxes = self.form.coders[-1].decode_single(deltas, torch.cat(list(proposals)))
        return of_images(boxes, scores[:, :-1], counts)

    def masks(
        self,
        maps: Sequence[Tensor],
        strides: Sequence[float],
        boxes: Sequence[Tensor],
        labels: Sequence[Tensor],
    ) -> list[Tensor]:
        """Returns mask probabilities inside selected boxes, (n, M, M) float32 for each image.

        Args:
            maps: Levels of the pyramid, finest first.
            strides: Stride of each level, in pixels.
            boxes: (n, 4) float32 for each image: left, top, right, bottom in pixels; n may be 0.
            labels: (n,) int64 for each image, classes of the boxes.
        """
        cuts = self._mask_cuts(self._features(maps, strides), boxes)
        return mean_masks(self._all_masks(cuts), labels, [len(box) for box in boxes])

    def _sample(
        self,
        proposals: Sequence[Tensor],
        targets: Sequence[Target],
        draws: NDArray,
        positive_iou: float,
    ) -> Sampled:
        return sample_rois(
            proposals,
            targets,
            draws,
            rois_per_image=self.rois_per_image,
            num_classes=self.num_classes,
            positive_iou=positive_iou,
            best_for_each=self.best_for_each,
        )

    def _features(self, maps: Sequence[Tensor], strides: Sequence[float]) -> Features:
        return Features(maps, strides)

    def _semantic_terms(self, features: Features, targets: Sequence[Target]) -> Terms:
        return {}

    def _stage(self, number: int, features: Features, rois: Sequence[Tensor]) -> Stage:
        cuts = self._box_cuts(features, rois)
        if self.form.gradient_scale != 1 and cuts.requires_grad:
            cuts.register_hook(lambda gradient: gradient * self.form.gradient_scale)
        return Stage(rois, *self.boxes[number](cuts))

    def _box_cuts(self, features: Features, rois: Sequence[Tensor]) -> Tensor:
        return pool(features.maps, features.strides, rois, BOX_SIDE)

    def _mask_cuts(self, features: Features, boxes: Sequence[Tensor]) -> Tensor:
        return pool(features.maps, features.strides, boxes, MASK_SIDE)

    def _masks_of(self, number: int, cuts: Tensor) -> Tensor:
        """Returns the logits (R, K, M, M) of the mask head with the index `number`.

        Args:
            number: Index of the mask head, counted from 0.
            cuts: (R, width, 14, 14), pooled features of R boxes.
        """
        return self.mask_heads[number](cuts)

    def _all_masks(self, cuts: Tensor) -> list[Tensor]:
        """Returns the logits (R, K, M, M) of each mask head.

        Args:
            cuts: (R, width, 14, 14), pooled features of R boxes.
        """
        return [head(cuts) for head in self.mask_heads]

    def _box_terms(self, number: int, stage: Stage, sampled: Sampled) -> Terms:
        classes, boxes = box_losses(
            stage.logits,
            stage.deltas,
            sampled,
            coder=self.form.coders[number],
            box_loss=self.box_loss,
        )
        weight, count = self.form.loss_weights[number], len(sampled.labels)
        # The box loss, too, is divided by the number of all sampled rois, not of the positives.
        return {
            f"cls_{number + 1}": (weight * classes, count),
            f"box_{number + 1}": (weight * boxes, count),
        }

    def _mask_terms(self, number: int, features: Features, of_masks: Taught) -> Terms:
        logits = self._masks_of(number, self._mask_cuts(features, of_masks.rois))
        loss = mask_loss(logits, of_masks.labels, of_masks.masks)
        weight = self.form.loss_weights[number]
        return {f"mask_{number + 1}": (weight * loss, len(of_masks.labels))}

    def _refined(self, number: int, stage: Stage, labels: Tensor, sizes: Tensor) -> list[Tensor]:
        """Returns a stage's rois after refinement by the stage, clipped to the image.

        Args:
            number: Index of the stage, counted from 0.
            stage: The stage's rois and output.
            labels: (R,) int64, the class whose box is used for each roi; not used if the heads are
                class-agnostic.
            sizes: (B, 2), height and width of each image without its padding.

        Returns: (n, 4) for each image: left, top, right, bottom in pixels.
        """
        counts = [len(roi) for roi in stage.rois]
        deltas = deltas_of(stage.deltas[: sum(counts)].detach(), labels)
        boxes = self.form.coders[number].decode_single(deltas, torch.cat(list(stage.rois)))
        return [
            cut_to(box[None], size[None])[0]
            for box, size in zip(boxes.split(counts), sizes, strict=True)
        ]

    @torch.no_grad()
    def _handed_on(
        self,
        number: int,
        stage: Stage,
        sampled: Sampled,
        proposals: Sequence[Tensor],
        sizes: Tensor,
    ) -> list[Tensor]:
        """Returns the boxes of each image that the next stage gets as its input.

        The boxes are the sampled rois, refined by this stage. If the next stage draws its own
        sample, it adds the boxes of the objects again; rois that came from boxes of objects are
        therefore dropped here. If the next stage draws no sample, refined boxes without area are
        dropped.

        Args:
            number: Index of the stage, counted from 0.
            stage: The stage's rois and output.
            sampled: The sample that the stage was run on.
            proposals: (n, 4) for each image, the boxes that the sample was drawn from.
            sizes: (B, 2), height and width of each image without its padding.

        Returns: (n, 4) for each image: left, top, right, bottom in pixels.
        """
        of_class = stage.logits[: len(sampled.labels), :-1].argmax(1)
        labels = torch.where(sampled.labels < self.num_classes, sampled.labels, of_class)
        refined = self._refined(number, stage, labels, sizes)
        if self.form.samples_again:
            return [
                box[numbers < len(proposal)]
                for box, numbers, proposal in zip(refined, sampled.numbers, proposals, strict=True)
            ]
        return [box[(box[:, 2:] > box[:, :2]).all(dim=1)] for box in refined]
