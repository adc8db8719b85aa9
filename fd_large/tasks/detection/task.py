"""The detection task: a student with a pyramid, a proposal network and heads, and their losses."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fd_large.backbones.statistics import IMAGENET, Statistics
from fd_large.data.loader import Batch
from fd_large.data.random_numbers import uniforms
from fd_large.engine.heads import make_head
from fd_large.engine.task import Task
from fd_large.errors import ConfigError
from fd_large.ranks import distributed
from fd_large.tasks.dense.pixels import normalised
from fd_large.tasks.dense.stages import features, has_stages, pyramid_of, strides_of, strip
from fd_large.tasks.detection.data.target import Target, Targets
from fd_large.tasks.detection.extra_attention import ExtraAttention
from fd_large.tasks.detection.heads.cascade import CascadeHeads
from fd_large.tasks.detection.heads.htc import HtcHeads
from fd_large.tasks.detection.heads.roi_heads import RoIHeads, Terms
from fd_large.tasks.detection.heads.rpn import (
    Proposals,
    RpnHead,
    anchors_of,
    propose,
    rpn_shapes_only,
    rpn_terms,
)
from fd_large.tasks.detection.heads.selection import Selection

HEADS: dict[str, Callable[..., nn.Module]] = {
    "mask_rcnn": RoIHeads,
    "cascade": CascadeHeads,
    "htc": HtcHeads,
}
"""Built-in heads for the proposals, by their names in a recipe (`task.detection.heads`)."""
# Number of a level's best anchors that NMS sees; more in training, while objects score low.
BEFORE_NMS_TRAINING, BEFORE_NMS = 2000, 1000


class Ask(NamedTuple):
    """A request for intermediate results of `Detection.forward`, used in tests with several views.

    Attributes:
        what: The result for each image: "proposals" (`Proposals`), "candidates" (`Candidates`), or
            "masks" (mask probabilities (n, M, M) float32).
        boxes: (n, 4) float32 for each image: left, top, right, bottom in pixels. With "masks", the
            boxes whose masks are predicted. With "candidates", boxes that replace the image's own
            proposals, or None to use the image's own proposals.
        labels: (n,) int64 for each image, the classes of `boxes`; used with "masks" only.
    """

    what: Literal["proposals", "candidates", "masks"]
    boxes: Sequence[Tensor] | None = None
    labels: Sequence[Tensor] | None = None


class Detection(Task):
    """A two-stage detector on a distilled student.

    Args:
        student: A backbone. Its final norm is removed, and so are the class tokens of a ViT.
        num_classes: Number of classes, K.
        heads: A name in the table `HEADS`, or heads of the user's own (`module:FILE.py:NAME`).
        heads_settings: Further keyword arguments of built-in heads, by name.
        width: Channels of the pyramid and the heads.
        anchors_per_image: Number of anchors sampled from each image for the proposal losses.
        proposals_per_image: Largest number of proposals of an image that NMS keeps.
        rois_per_image: Number of proposals sampled from each image for the losses of the heads.
        extra_attention: Whether an attention layer over the whole last map precedes the pyramid.
        selection: Rule that selects the reported boxes; None for the defaults of `Selection`.
        seed: Seed of the random samples. These also depend on the epoch and on the position of an
            image in the epoch's order.
        statistics: Mean and deviation that normalise the student's pixels.

    Raises: ConfigError: for an unknown name, or a student that can carry no pyramid.
    """

    def __init__(
        self,
        student: nn.Module,
        num_classes: int,
        *,
        heads: str = "mask_rcnn",
        heads_settings: Mapping[str, Any] | None = None,
        width: int = 256,
        anchors_per_image: int = 256,
        proposals_per_image: int = 1000,
        rois_per_image: int = 512,
        extra_attention: bool = False,
        selection: Selection | None = None,
        seed: int = 0,
        statistics: Statistics = IMAGENET,
    ) -> None:
        super().__init__(student)
        strip(student)
        if extra_attention and not has_stages(student):
            raise ConfigError(
                "task.detection.extra_attention: the student has no map of stride 32; got "
                f"{type(student).__name__}, expected a Swin or SwinV2. Leave out extra_attention."
            )
        last_width = student.stage_widths[-1] if extra_attention else 0
        self.attention = ExtraAttention(last_width) if extra_attention else None
        self.pyramid = pyramid_of(student, width)
        self.rpn = RpnHead(width)
        self.heads = make_head(
            heads,
            num_classes,
            width,
            built_in={name: partial(make, **heads_settings or {}) for name, make in HEADS.items()},
            where="task.detection.heads",
            rois_per_image=rois_per_image,
        )
        self.strides = strides_of(student)
        self.anchors_per_image = anchors_per_image
        self.proposals_per_image = proposals_per_image
        self.selection = selection or Selection()
        self.seed, self.statistics = seed, statistics

    def prepare(self, images: Tensor, targets: Targets, keep: Tensor | None) -> dict[str, Any]:
        """Returns the arguments of `forward`: normalised pixels, targets, and random numbers.

        Args:
            images: (B, 3, H, W) uint8, padded at the right and the bottom, on the device.
            targets: The targets of the batch, with sizes and positions of the images.
            keep: (num_sites, B) bool, the branches that drop path keeps; None keeps all.
        """
        counts = {"anchors": 2 * self.anchors_per_image, "proposals": self.heads.draws_per_image}
        return {
            "pixels": self.pixels(images, targets.sizes),
            "sizes": targets.sizes,
            "keep": keep,
            "targets": targets.targets,
            "draws": {
                stream: uniforms(self.seed, targets.epoch, targets.positions, stream, count)
                for stream, count in counts.items()
            },
        }

    def pixels(self, images: Tensor, sizes: Tensor) -> Tensor:
        """Normalises images (B, 3, H, W) uint8 to float32, and makes their padding grey.

        Args:
            images: Images padded at the right and the bottom.
            sizes: (B, 2), height and width of each image without its padding.
        """
        return normalised(images, sizes, self.statistics)

    def forward(
        self,
        *,
        pixels: Tensor,
        sizes: Tensor,
        keep: Tensor | None = None,
        targets: list[Target] | None = None,
        draws: dict[str, NDArray] | None = None,
        ask: Ask | None = None,
    ) -> tuple[Tensor, dict[str, Tensor]] | list[Any]:
        """Returns the loss and its terms, or the results of a test if `targets` is None.

        If `targets` is not None, all ranks must call this method.

        Args:
            pixels: (B, 3, H, W) float32, normalised for the student.
            sizes: (B, 2) int64, height and width of each image without its padding.
            keep: (num_sites, B) bool, the branches that drop path keeps; None keeps all.
            targets: The target of each image, in training.
            draws: In training, {"anchors": array, "proposals": array}: uniform random numbers in
                [0, 1), (B, count), by which anchors and proposals are sampled.
            ask: Without targets, the request for other results than `Detections`.

        Returns: with targets (loss, {name: term}), scalars; without targets a list with the
            `Detections` of each image, or with the result that `ask` names.
        """
        maps, logits, deltas = self._maps(pixels, sizes, keep)
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
            return self._answer(maps, proposals, sizes, ask)
        boxes = [proposal.boxes for proposal in proposals]
        of_rpn = rpn_terms(
            torch.cat(logits, dim=1),
            torch.cat(deltas, dim=1),
            torch.cat(anchors),
            targets,
            draws["anchors"],
            anchors_per_image=self.anchors_per_image,
        )
        of_heads = self.heads.terms(maps, self.strides, boxes, sizes, targets, draws["proposals"])
        return combine({**of_rpn, **of_heads})

    def shapes_only(self, batch: Batch) -> Tensor:
        """Runs backbone, pyramid and all heads on the largest possible number of anchors and boxes.

        Operations whose work depends on the content of images are left out: selection of proposals,
        matching, sampling, and cropping of target masks. None of these contains a matrix product.

        Args:
            batch: A batch, of which only the images and their sizes are used; may be on the meta
                device.

        Returns: the sum of all losses, a scalar that backward can run through.
        """
        with torch.no_grad():
            pixels = self.pixels(batch.images, batch.targets.sizes)
        maps, logits, deltas = self._maps(pixels, batch.targets.sizes, self.keep_all(pixels))
        return self.heads.shapes_only(maps, self.strides) + rpn_shapes_only(
            torch.cat(logits, dim=1),
            torch.cat(deltas, dim=1),
            anchors_per_image=self.anchors_per_image,
        )

    def _maps(
        self, pixels: Tensor, sizes: Tensor, keep: Tensor | None
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Runs backbone, pyramid and proposal head.

        Args:
            pixels: (B, 3, H, W) float32, normalised for the student.
            sizes: (B, 2), height and width of each image without its padding.
            keep: (num_sites, B) bool, the branches that drop path keeps; None keeps all.

        Returns: three lists with an item for each pyramid level, finest first: maps
            (B, C, H_l, W_l), objectness logits (B, A_l) and box deltas (B, A_l, 4) of the level's
            anchors.
        """
        stages = features(self.student, pixels, keep)
        if self.attention is not None:
            *finer, last = stages
            stages = (*finer, self.attention(last, sizes, self.student.stage_strides[-1]))
        maps = self.pyramid(stages)
        logits, deltas = zip(*(self.rpn(level) for level in maps), strict=True)
        return maps, list(logits), list(deltas)

    def _answer(
        self, maps: list[Tensor], proposals: list[Proposals], sizes: Tensor, ask: Ask | None
    ) -> list[Any]:
        if ask is not None and ask.what == "proposals":
            return proposals
        if ask is not None and ask.what == "masks":
            return self.heads.masks(maps, self.strides, ask.boxes, ask.labels)
        own_boxes = [proposal.boxes for proposal in proposals]
        candidates = self.heads.candidates(
            maps, self.strides, own_boxes if ask is None or ask.boxes is None else ask.boxes, sizes
        )
        if ask is not None:
            return candidates
        chosen = [
            self.selection.of_candidates(*of_image, size)
            for of_image, size in zip(candidates, sizes, strict=True)
        ]
        boxes, labels = [of.boxes for of in chosen], [of.labels for of in chosen]
        masks = self.heads.masks(maps, self.strides, boxes, labels)
        return [self.selection.detections(of, mask) for of, mask in zip(chosen, masks, strict=True)]

    def see(self, images: Tensor, sizes: Tensor, ask: Ask | None = None) -> list[Any]:
        """Returns the `Detections` of each image, or the result for each image that `ask` names.

        All ranks call the same modules in the same order, as ZeRO-3 requires.

        Args:
            images: (B, 3, H, W) uint8, padded at the right and the bottom.
            sizes: (B, 2) int64, height and width of each image without its padding.
            ask: The request for other results than `Detections`.
        """
        return self(pixels=self.pixels(images, sizes), sizes=sizes, ask=ask)


def combine(terms: Terms) -> tuple[Tensor, dict[str, Tensor]]:
    """Returns this rank's loss and its terms from sums and counts; all ranks must call it.

    DeepSpeed averages gradients over the ranks. Each rank therefore divides the sum of a term by
    the mean count per rank. The average over the ranks is then the total sum divided by the total
    count, and does not depend on which rank an image is on.

    Args:
        terms: For each term, the sum over this rank's samples and their number.

    Returns: the loss, a scalar, and the detached terms by name. The means of loss and terms over
        the ranks are the values of the whole batch.
    """
    sums = [total for total, _ in terms.values()]
    counts = torch.tensor([float(count) for _, count in terms.values()])
    counts = counts.to(sums[0].device, non_blocking=True)
    # A batch in which nothing was sampled has sums of 0.
    means = distributed.sum_tensor(counts).clamp(min=1) / distributed.world_size()
    means_of = torch.stack(sums) / means
    return means_of.sum(), dict(zip(terms, means_of.detach().unbind(), strict=True))
