"""Detection as a task: a student, a pyramid, region proposals and heads, and their losses."""

from __future__ import annotations

from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fd_large.backbones.statistics import IMAGENET, Statistics, normalise
from fd_large.data.random_numbers import uniforms
from fd_large.engine.task import Task
from fd_large.tasks.dense.stages import SwinOrViT, features, pyramid_of, strides_of, strip
from fd_large.tasks.detection.heads.inference import Detections
from fd_large.tasks.detection.heads.losses import combine
from fd_large.tasks.detection.heads.roi_heads import RoIHeads
from fd_large.tasks.detection.heads.rpn import RpnHead, anchors_of, propose, rpn_sums
from fd_large.tasks.detection.heads.target import Target, Targets

# Best anchors of a level that are looked at: more in training, where objects are found late.
BEFORE_NMS_TRAINING, BEFORE_NMS = 2000, 1000
# Of pixels that pad an image, as in detectron2's large-scale jitter. Not 0 after normalisation: a
# model whose biases are still 0 maps that to 0, where each norm multiplies gradients by
# 1 / sqrt(eps).
PADDING = 128


class Detection(Task):
    """Mask R-CNN on a distilled student.

    Args:
        student: A Swin, SwinV2 or ViT; it loses its final norm and its class token.
        num_classes: K.
        width: Channels of the pyramid and the heads.
        anchors_per_image: Sampled for the losses of the proposals.
        proposals_per_image: Kept.
        rois_per_image: Sampled of them for the losses of the heads.
        detections_per_image: Returned at most.
        seed: Of the samples.
        statistics: The student's normalisation.
    """

    def __init__(
        self,
        student: SwinOrViT,
        num_classes: int,
        *,
        width: int = 256,
        anchors_per_image: int = 256,
        proposals_per_image: int = 1000,
        rois_per_image: int = 512,
        detections_per_image: int = 100,
        seed: int = 0,
        statistics: Statistics = IMAGENET,
    ) -> None:
        super().__init__(student)
        strip(student)
        self.pyramid: nn.Module = pyramid_of(student, width)
        self.rpn = RpnHead(width)
        self.heads = RoIHeads(
            num_classes,
            width,
            rois_per_image=rois_per_image,
            detections_per_image=detections_per_image,
        )
        self.strides = strides_of(student)
        self.anchors_per_image = anchors_per_image
        self.proposals_per_image = proposals_per_image
        self.seed, self.statistics = seed, statistics

    def prepare(self, images: Tensor, targets: Targets, keep: Tensor | None) -> dict[str, Any]:
        """Returns the student's pixels, the targets, and draws for the samples of each image."""
        positions = targets.positions.cpu().numpy()
        counts = {"anchors": self.anchors_per_image, "proposals": self.heads.rois_per_image}
        return {
            "pixels": self.pixels(images, targets.sizes),
            "sizes": targets.sizes,
            "keep": keep,
            "targets": targets.targets,
            "draws": {
                stream: uniforms(self.seed, targets.epoch, positions, stream, 2 * count)
                for stream, count in counts.items()
            },
        }

    def pixels(self, images: Tensor, sizes: Tensor) -> Tensor:
        """Normalises images (B, 3, H, W) uint8 to float32; beyond their sizes all is grey."""
        height, width = images.shape[-2:]
        rows = torch.arange(height, device=images.device) < sizes[:, :1]  # (B, H)
        columns = torch.arange(width, device=images.device) < sizes[:, 1:]
        inside = rows[:, None, :, None] & columns[:, None, None, :]
        return normalise(images.where(inside, PADDING), self.statistics)

    def forward(
        self,
        *,
        pixels: Tensor,
        sizes: Tensor,
        keep: Tensor | None = None,
        targets: list[Target] | None = None,
        draws: dict[str, NDArray] | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]] | list[Detections]:
        """Returns the loss and its terms (a collective), or without targets what is seen.

        Args:
            pixels: (B, 3, H, W) float32, normalised for the student.
            sizes: (B, 2) int64, height and width of each image without its padding.
            keep: (num_sites, B) bool, or None.
            targets: Of each image.
            draws: "anchors" and "proposals", a row of uniform numbers for each image.
        """
        maps = self.pyramid(features(self.student, pixels, keep))
        logits, deltas = zip(*(self.rpn(level) for level in maps), strict=True)
        grids = tuple((level.shape[2], level.shape[3]) for level in maps)
        anchors = anchors_of(grids, self.strides, pixels.device)
        proposals = propose(
            [logit.detach() for logit in logits],
            [delta.detach() for delta in deltas],
            anchors,
            sizes,
            before_nms=BEFORE_NMS if targets is None else BEFORE_NMS_TRAINING,
            after_nms=self.proposals_per_image,
        )
        if targets is None:
            return self.heads.detect(maps, self.strides, proposals, sizes)
        sums, counts = rpn_sums(
            torch.cat(logits, dim=1),
            torch.cat(deltas, dim=1),
            torch.cat(anchors),
            targets,
            draws["anchors"],
            anchors_per_image=self.anchors_per_image,
        )
        of_heads = self.heads.sums(maps, self.strides, proposals, targets, draws["proposals"])
        return combine(sums | of_heads[0], counts | of_heads[1])

    @torch.no_grad()
    def detect(self, images: Tensor, sizes: Tensor) -> list[Detections]:
        """What is seen in images, by the modules of training in one order on all ranks.

        Args:
            images: (B, 3, H, W) uint8, padded right and bottom.
            sizes: (B, 2) int64, height and width of each image without its padding.
        """
        return self(pixels=self.pixels(images, sizes), sizes=sizes)
