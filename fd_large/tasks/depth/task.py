"""The depth task: a head on a student's last map predicts the depth of each pixel.

The student's final norm is replaced by a new norm before the head, unless the head is linear.

Source: Xie et al., arXiv 2205.13543, and its code, SwinTransformer/MIM-Depth-Estimation.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fd_large.backbones.statistics import IMAGENET, Statistics
from fd_large.engine.heads import make_head
from fd_large.tasks.dense.convolution import NORM_EPS, ChannelNorm, at_least_float32
from fd_large.tasks.dense.pixels import normalised
from fd_large.tasks.dense.stages import (
    features,
    has_stages,
    maps_of_blocks,
    normed_last_map,
    strip,
    to_pixels,
)
from fd_large.tasks.dense.target import Targets
from fd_large.tasks.dense.task import DenseTask
from fd_large.tasks.depth.heads.linear_head import LinearHead
from fd_large.tasks.depth.heads.mim_head import MimHead
from fd_large.tasks.depth.loss import Over, Whole, silog_loss, silog_sums
from fd_large.tasks.depth.section import ON_LAST_MAP

HEADS: dict[str, Callable[..., nn.Module]] = {
    "mim": MimHead,
    "linear": lambda in_width, width, stride: LinearHead(in_width),
}
"""Built-in heads, by their names in a recipe (`task.depth.head`). Each is constructed from
(channels of the map, channels of the head, stride of the map in pixels), and returns logits
(B, 1, H, W), of any size, for a map (B, C, h, w). A depth is the sigmoid of a logit, times the
largest depth."""


class Depth(DenseTask):
    """A distilled student with a head that predicts the depth of each pixel.

    Args:
        student: A backbone. Its final norm is removed, unless the head is linear.
        max_depth: Largest depth that the head can predict, in metres.
        head: A name in the table `HEADS`, or a head of the user's own (`module:FILE.py:NAME`).
        width: Channels of the head.
        over: Pixels over which the loss takes means (`silog_loss`): "batch", all pixels of a step's
            images, or "image", the pixels of each image.
        mean_share: Share of the squared mean that the loss subtracts, in [0, 1].
        factor: Factor of the loss.
        frozen: Whether the student is frozen.
        statistics: Mean and deviation that normalise the student's pixels.

    Raises: ConfigError: for an unknown name, or a student that cannot carry the head.
    """

    def __init__(
        self,
        student: nn.Module,
        *,
        max_depth: float = 10.0,
        head: str = "mim",
        width: int = 128,
        over: Over = "batch",
        mean_share: float = 0.5,
        factor: float = 1.0,
        frozen: bool = False,
        statistics: Statistics = IMAGENET,
    ) -> None:
        super().__init__(student, frozen=frozen, statistics=statistics)
        self.norm: ChannelNorm | None = None
        if head not in ON_LAST_MAP:
            strip(student, windowed=False)
            self.norm = ChannelNorm(student.width, NORM_EPS)
        self.head = make_head(
            head,
            student.width,
            width,
            student.stride,
            built_in=HEADS,
            where="task.depth.head",
        )
        self.max_depth = max_depth
        self.over, self.mean_share, self.factor = over, mean_share, factor

    def prepare(self, images: Tensor, targets: Targets, keep: Tensor | None) -> dict[str, Any]:
        """Returns the arguments of `forward`: normalised pixels, `keep`, and true depths.

        Args:
            images: (B, 3, H, W) uint8, padded at the right and the bottom, on the device.
            targets: The targets of the batch, with the true depth of each pixel.
            keep: (num_sites, B) bool, the branches that drop path keeps; None keeps all.
        """
        pixels = normalised(images, targets.sizes, self.statistics)
        return {"pixels": pixels, "keep": keep, "depths": targets.truth}

    def two_passes(self, micro_batches: int) -> bool:
        """Whether the loss needs sums over all images of a step before the first backward.

        This is so if the loss is a single root over the whole step (`over` is "batch"), and the
        step has several micro-batches.

        Args:
            micro_batches: Number of micro-batches of a rank in the step.
        """
        return self.over == "batch" and micro_batches > 1

    def sums(self, forward: Callable[..., Any], prepared: dict[str, Any]) -> Tensor:
        """Returns `silog_sums` over a micro-batch's images, (3,) float64, by a separate forward.

        Args:
            forward: Calls this task's `forward`, through its engine if there is one.
            prepared: Result of `prepare`.
        """
        return forward(**prepared, for_sums=True)

    def with_totals(
        self, prepared: dict[str, Any], totals: Tensor, *, parts: int
    ) -> dict[str, Any]:
        """Returns the arguments of `forward` with the sums over the step added.

        Args:
            prepared: Result of `prepare`.
            totals: (3,) float64, the sum of `sums` over the micro-batches of all ranks.
            parts: Number of these micro-batches.
        """
        return {**prepared, "whole": Whole(totals, parts)}

    def forward(
        self,
        *,
        pixels: Tensor,
        keep: Tensor | None = None,
        depths: Tensor | None = None,
        whole: Whole | None = None,
        for_sums: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor]] | Tensor:
        """Returns the loss, or the predicted depths if no true depths are given.

        Args:
            pixels: (B, 3, H, W) float32, normalised for the student.
            keep: (num_sites, B) bool, the branches that drop path keeps; None keeps all.
            depths: (B, H, W), the true depths in metres; 0 where the depth is unknown.
            whole: The sums over a step of several micro-batches (`silog_loss`). None if the step is
                this micro-batch on all ranks, or if the loss averages over images.
            for_sums: True to return sums in place of the loss; used only if `depths` is not None.

        Returns: if `depths` is None, the predicted depths, (B, H, W) float32, in metres. Otherwise,
            if `for_sums` is True, the sum of `silog_sums` over the images, (3,) float64; if it is
            False, (loss, {}), a scalar and no further metrics.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            last = self._map(pixels, keep)
        if self.norm is not None:
            last = self.norm(last)
        logits = at_least_float32(self.head(last))
        logits = to_pixels(self.student, logits, pixels)[:, 0]
        if depths is None:
            return self.max_depth * logits.sigmoid()
        # By logsigmoid, which is finite even if the sigmoid rounds to 0.
        log_depths = math.log(self.max_depth) + F.logsigmoid(logits)
        if for_sums:
            return silog_sums(log_depths, depths).sum(1)
        loss = silog_loss(
            log_depths,
            depths,
            over=self.over,
            mean_share=self.mean_share,
            factor=self.factor,
            whole=whole,
        )
        return loss, {}

    def _map(self, pixels: Tensor, keep: Tensor | None) -> Tensor:
        """Returns the student's last map, (B, C, h, w).

        For a linear head the map has passed the student's final norm. For other heads it has not.

        Args:
            pixels: (B, 3, H, W) float32, normalised for the student.
            keep: (num_sites, B) bool, the branches that drop path keeps; None keeps all.
        """
        if self.norm is None:
            return normed_last_map(self.student, pixels, keep)
        if has_stages(self.student):
            last = features(self.student, pixels, keep)[-1]
        else:
            (last,) = maps_of_blocks(self.student, pixels, keep, [self.student.depths[0] - 1])
        return last.permute(0, 3, 1, 2)

    def layer_scale(self, name: str, decay: float) -> float:
        """Returns the factor of a parameter's learning rate under layer-wise decay.

        The factor is 1 for parameters outside the student, and 0 for those of a frozen student. In
        a Swin model each patch merging counts as a layer, as in the published runs.

        Args:
            name: The parameter's name in this Module.
            decay: Factor from each layer of the student to the layer below it.
        """
        inside = name.removeprefix("student.")
        if self.frozen or inside == name or not hasattr(self.student, "layers_above"):
            return super().layer_scale(name, decay)
        return decay ** self.student.layers_above(inside)
