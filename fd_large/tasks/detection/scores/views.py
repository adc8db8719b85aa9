"""Test-time augmentation: views of an image at several sizes and mirrored, and their merging.

Views are processed one after another, and their maps are not kept. A test of many views therefore
needs the memory of the largest view, but runs each view two or three times.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torchvision.ops import nms

from fd_large.tasks.dense.geometry import padded
from fd_large.tasks.detection.heads.roi_heads import Candidates
from fd_large.tasks.detection.heads.rpn import NMS_IOU
from fd_large.tasks.detection.heads.selection import Chosen, Detections, Selection
from fd_large.tasks.detection.task import Ask

Merge = Literal["average", "areas", "union"]
AREAS = {"s": (0.0, 32.0**2), "m": (32.0**2, 96.0**2), "l": (96.0**2, float("inf"))}
"""Bounds of COCO's small, medium and large areas in pixels: lower (excluded) and upper bound."""


class TestViews(NamedTuple):
    """The sizes at which an image is tested.

    Attributes:
        short_side: Length of the shorter side at scale 1, in pixels.
        long_side: Upper limit of the longer side at scale 1.
        scales: The scales.
        flip: Whether the model also sees each view mirrored.
        merge: How several views are merged. "average": every view gets the best proposals of all
            views, and boxes, scores and masks are averaged (mmdetection 2). "areas": the boxes of
            all views are pooled before selection, with only some areas from each scale
            (ViT-Adapter). "union": the selected boxes of all views are pooled and selected again
            (detectron2, mmdetection 3).
        areas: Used if `merge` is "areas": for each scale, the ranges of area of the boxes that the
            scale provides, as letters of the table `AREAS`; empty for all areas.
        square: Side in pixels of the square to which images are padded. If the limit of the longer
            side at a scale is larger than `square`, this limit is the side. 0 pads to the largest
            image of a batch. Since padding changes the size of the map, it changes the
            detections. With a square, detections depend neither on the rest of the batch nor on the
            image's aspect ratio.
    """

    # No test of pytest's.
    __test__ = False

    short_side: int
    long_side: int
    scales: tuple[float, ...] = (1.0,)
    flip: bool = False
    merge: Merge = "average"
    areas: tuple[str, ...] = ()
    square: int = 0

    @property
    def sides(self) -> list[tuple[int, int]]:
        """For each scale, the shorter side and the upper limit of the longer side, in pixels."""
        return [
            (int(self.short_side * scale), int(self.long_side * scale)) for scale in self.scales
        ]


class ShownView(NamedTuple):
    """A batch of images in one view; maps boxes between the view and the original images.

    Attributes:
        images: (B, 3, H, W) uint8, padded at the right and the bottom.
        sizes: (B, 2), height and width of each image in this view, without the padding.
        original_sizes: (B, 2), height and width of each original image.
        mirrored: Whether the view is mirrored.
        areas: Which boxes are taken from this view, by their area, as letters of the table `AREAS`.
    """

    images: Tensor
    sizes: Tensor
    original_sizes: Tensor
    mirrored: bool
    areas: str

    def to_original(self, boxes: Tensor, place: int) -> Tensor:
        """Maps boxes of an image from pixels of this view to pixels of the original image.

        Args:
            boxes: (..., 4): left, top, right, bottom.
            place: Index of the image in the batch.
        """
        return self._mirror(boxes, place) * self._ratio(place)

    def from_original(self, boxes: Tensor, place: int) -> Tensor:
        """Maps boxes of an image from pixels of the original image to pixels of this view.

        Args:
            boxes: (..., 4): left, top, right, bottom.
            place: Index of the image in the batch.
        """
        return self._mirror(boxes / self._ratio(place), place)

    def _ratio(self, place: int) -> Tensor:
        return (self.original_sizes[place] / self.sizes[place]).flip(0).repeat(2)

    def _mirror(self, boxes: Tensor, place: int) -> Tensor:
        if not self.mirrored:
            return boxes
        left, top, right, bottom = boxes.unbind(-1)
        width = self.sizes[place, 1]
        return torch.stack([width - right, top, width - left, bottom], dim=-1)


class Model(NamedTuple):
    """The model under test.

    Attributes:
        see: `Detection.see`, or a function like it: maps images (B, 3, H, W) uint8, sizes (B, 2)
            and an `Ask` or None to a result for each image. The detector is in evaluation mode. If
            the detector is sharded, all ranks must make the same calls.
        views: The views of an image.
        selection: Rule by which boxes are selected after the views are merged.
        proposals_per_image: Largest number of proposals of an image that are shared by its views.
    """

    see: Callable[[Tensor, Tensor, Ask | None], Any]
    views: TestViews
    selection: Selection
    proposals_per_image: int

    def in_words(self) -> str:
        """Returns a description of the test settings, which is printed next to the scores."""
        views, rule = self.views, self.selection
        scales = " ".join(f"{scale:g}" for scale in views.scales)
        words = [f"{views.short_side} px (at most {views.long_side})"]
        words += [f"scales {scales}"] * (views.scales != (1.0,))
        words += ["mirrored too"] * views.flip
        words += [f"merged by {views.merge}"] * (len(views.scales) > 1 or views.flip)
        words += [f"{rule.nms} NMS from IoU {rule.iou:g}", f"scores above {rule.least_score:g}"]
        words += ["rescored by masks"] * rule.rescored
        return ", ".join(words)

    @torch.no_grad()
    def detect(
        self, images: Sequence[Tensor], sizes: Sequence[Tensor], original_sizes: Tensor
    ) -> list[Detections]:
        """Returns the detections in each image, in pixels of the original image.

        Args:
            images: For each scale, the images, (B, 3, H, W) uint8, padded at the right and the
                bottom.
            sizes: For each scale, height and width of each image without its padding, (B, 2) int64.
            original_sizes: (B, 2) int64, height and width of the original images.
        """
        views = list(self._views(images, sizes, original_sizes))
        if len(views) == 1:
            (view,) = views
            detections: list[Detections] = self.see(view.images, view.sizes, None)
            return [
                of_image._replace(boxes=view.to_original(of_image.boxes, i))
                for i, of_image in enumerate(detections)
            ]
        of_views = self._candidates(views)
        chosen = [
            merged([(view, of[i]) for view, of in of_views], i, self.views, self.selection)
            for i in range(len(original_sizes))
        ]
        masks = [torch.zeros(())] * len(chosen)
        for view in views:
            boxes = [view.from_original(of.boxes, i) for i, of in enumerate(chosen)]
            ask = Ask("masks", boxes, [of.labels for of in chosen])
            for i, mask in enumerate(self.see(view.images, view.sizes, ask)):
                masks[i] = masks[i] + unmirrored(mask, view.mirrored) / len(views)
        return [self.selection.detections(of, mask) for of, mask in zip(chosen, masks, strict=True)]

    def _views(
        self, images: Sequence[Tensor], sizes: Sequence[Tensor], original_sizes: Tensor
    ) -> Iterator[ShownView]:
        areas = self.views.areas or ("sml",) * len(self.views.scales)
        for pixels, size, area, (_, long) in zip(
            images, sizes, areas, self.views.sides, strict=True
        ):
            if self.views.square:
                side = max(self.views.square, long)
                pixels = padded(pixels, (side, side))
            yield ShownView(pixels, size, original_sizes, False, area)
            if self.views.flip:
                yield ShownView(mirrored(pixels, size), size, original_sizes, True, area)

    def _candidates(self, views: Sequence[ShownView]) -> list[tuple[ShownView, list[Candidates]]]:
        proposals: list[Tensor] | None = None
        if self.views.merge == "average":
            proposals = self._shared_proposals(views)
        candidates = []
        for view in views:
            boxes = proposals and [view.from_original(of, i) for i, of in enumerate(proposals)]
            candidates.append((view, self.see(view.images, view.sizes, Ask("candidates", boxes))))
        return candidates

    def _shared_proposals(self, views: Sequence[ShownView]) -> list[Tensor]:
        """Pools the proposals of each image from all its views, and selects the best by NMS.

        Returns: (n, 4) for each image: left, top, right, bottom in pixels of the original image.
        """
        boxes: list[list[Tensor]] = []
        scores: list[list[Tensor]] = []
        for view in views:
            of_view = self.see(view.images, view.sizes, Ask("proposals"))
            boxes.append([view.to_original(box, i) for i, (box, _) in enumerate(of_view)])
            scores.append([score for _, score in of_view])
        best = []
        for of_image, score in zip(
            zip(*boxes, strict=True), zip(*scores, strict=True), strict=True
        ):
            box = torch.cat(of_image)
            best.append(box[nms(box, torch.cat(score), NMS_IOU)[: self.proposals_per_image]])
        return best


def merged(
    candidates: Sequence[tuple[ShownView, Candidates]],
    place: int,
    views: TestViews,
    selection: Selection,
) -> Chosen:
    """Merges the candidates of an image from all its views, and selects boxes.

    Args:
        candidates: Each view, with the candidates of the image in this view.
        place: Index of the image in its batch.
        views: The test's views, with the rule by which they are merged.
        selection: Rule by which boxes are selected.
    """
    size = candidates[0][0].original_sizes[place]
    boxes = [view.to_original(of.boxes, place) for view, of in candidates]
    scores = [of.scores for _, of in candidates]
    if views.merge == "average":
        mean, score = torch.stack(boxes).mean(0), torch.stack(scores).mean(0)
        return selection.of_candidates(mean, score, size)
    if views.merge == "areas":
        scores = [
            score * in_areas(box, view.areas)
            for (view, _), box, score in zip(candidates, boxes, scores, strict=True)
        ]
        return selection.of_candidates(torch.cat(boxes), torch.cat(scores), size)
    of_views = [
        selection.of_candidates(box, score, size) for box, score in zip(boxes, scores, strict=True)
    ]
    return selection.of_boxes(*(torch.cat(part) for part in zip(*of_views, strict=True)))


def in_areas(boxes: Tensor, areas: str) -> Tensor:
    """Returns for each box whether its area is in one of the ranges `areas`, (...) bool.

    A range includes its upper bound, but not its lower bound.

    Args:
        boxes: (..., 4): left, top, right, bottom in pixels.
        areas: Letters, each of which names a range in the table `AREAS`.
    """
    area = (boxes[..., 2] - boxes[..., 0]) * (boxes[..., 3] - boxes[..., 1])
    inside = torch.zeros_like(area, dtype=torch.bool)
    for low, high in map(AREAS.__getitem__, areas):
        inside |= (area > low) & (area <= high)
    return inside


def unmirrored(masks: Tensor, are_mirrored: bool) -> Tensor:
    """Mirrors masks (..., M, M) left to right if `are_mirrored`; else returns them unchanged."""
    return masks.flip(-1) if are_mirrored else masks


def mirrored(images: Tensor, sizes: Tensor) -> Tensor:
    """Returns images that are mirrored left to right; the padding stays at the right.

    Args:
        images: (B, 3, H, W), padded at the right and the bottom.
        sizes: (B, 2), height and width of each image without its padding.
    """
    flipped = images.clone()
    for image, width in zip(flipped, sizes[:, 1].tolist(), strict=True):
        image[..., :width] = image[..., :width].flip(-1)
    return flipped
