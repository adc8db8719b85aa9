"""The region proposal network, which predicts boxes of possible objects from anchors.

Each level of the feature pyramid has anchors, of a size that fits the level's stride.

Source: Ren et al., arXiv 1506.01497, as implemented in detectron2 and torchvision; with two
convolutions as in ViTDet (arXiv 2203.16527).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torchvision.ops import batched_nms

from fd_large.backbones.initialization import Draw
from fd_large.engine.zero.private_names import get
from fd_large.tasks.dense.convolution import Convolution
from fd_large.tasks.detection.data.target import Target
from fd_large.tasks.detection.heads.matching import match, sample

RATIOS = (0.5, 1.0, 2.0)
# Side of a level's square anchor, as a multiple of the level's stride: 32 pixels at stride 4.
ANCHOR_PLACES = 8
POSITIVE_IOU, NEGATIVE_IOU = 0.7, 0.3
POSITIVE_SHARE = 0.5
NMS_IOU = 0.7
CODER = get("torchvision.models.detection._utils:BoxCoder")(weights=(1.0, 1.0, 1.0, 1.0))
AnchorGenerator = get("torchvision.models.detection.anchor_utils:AnchorGenerator")


class RpnHead(nn.Module):
    """Predicts objectness and a box for each anchor, by the same convolutions on every level.

    Args:
        width: Channels of the pyramid.
    """

    def __init__(self, width: int):
        super().__init__()
        draw, anchors = Draw("normal", std=0.01), len(RATIOS)
        self.convolutions = nn.ModuleList(Convolution(width, width, 3, draw=draw) for _ in range(2))
        self.objectness = Convolution(width, anchors, 1, draw=draw)
        self.deltas = Convolution(width, 4 * anchors, 1, draw=draw)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Maps a level (B, C, H, W) to logits (B, H * W * A) and deltas (B, H * W * A, 4), float32.

        The A = 3 anchors of a position differ in aspect ratio. The order of the level's anchors is
        row by row, then column by column, then ratio by ratio.
        """
        for convolution in self.convolutions:
            x = F.relu(convolution(x))
        logits = self.objectness(x).permute(0, 2, 3, 1).flatten(1)
        deltas = self.deltas(x).permute(0, 2, 3, 1).reshape(len(x), -1, 4)
        return logits.float(), deltas.float()


@lru_cache(maxsize=16)
def anchors_of(
    grids: tuple[tuple[int, int], ...], strides: tuple[float, ...], device: torch.device
) -> tuple[Tensor, ...]:
    """Returns the anchors of each level, three for each position, in the order that `RpnHead` uses.

    Args:
        grids: Height and width of each level's map.
        strides: Stride of each level, in pixels.
        device: Device of the result.

    Returns: (H * W * 3, 4) float32 for each level: left, top, right, bottom in pixels.
    """
    with torch.inference_mode(False):
        # Made here rather than in a constructor, where zero.Init rounds the tables of a bf16 run.
        sizes = tuple((ANCHOR_PLACES * stride,) for stride in strides)
        generator = AnchorGenerator(sizes, (RATIOS,) * len(strides))
        # torchvision would round anchors to whole pixels; detectron2 and mmdetection do not.
        generator.cell_anchors = [_cell_anchors(*size).to(device) for size in sizes]
        steps = [[stride, stride] for stride in strides]
        return tuple(generator.grid_anchors([list(grid) for grid in grids], steps))


def _cell_anchors(side: float) -> Tensor:
    """Makes an anchor, centred at (0, 0), for each of the A aspect ratios in `RATIOS`.

    Args:
        side: Square root of the area of every anchor, in pixels.

    Returns: (A, 4) float32: left, top, right, bottom in pixels.
    """
    height = torch.tensor(RATIOS).sqrt() * side
    width = side**2 / height
    return torch.stack([-width, -height, width, height], dim=1) / 2


class Proposals(NamedTuple):
    """The proposals of one image, by falling score.

    Attributes:
        boxes: (n, 4) float32: left, top, right, bottom in pixels.
        scores: (n,) float32, logits of objectness.
    """

    boxes: Tensor
    scores: Tensor


@torch.no_grad()
def propose(
    logits: Sequence[Tensor],
    deltas: Sequence[Tensor],
    anchors: Sequence[Tensor],
    sizes: Tensor,
    *,
    before_nms: int,
    after_nms: int,
) -> list[Proposals]:
    """Selects the proposals of each image by objectness and NMS, at most `after_nms` of them.

    Args:
        logits: (B, A_l) float32 for each level, objectness of its A_l anchors.
        deltas: (B, A_l, 4) float32 for each level, offsets of the boxes from the anchors.
        anchors: (A_l, 4) for each level: left, top, right, bottom in pixels.
        sizes: (B, 2), height and width of each image without its padding, to which boxes are
            clipped.
        before_nms: Largest number of a level's boxes that go into NMS, those of highest logit.
        after_nms: Largest number of proposals that are kept.
    """
    boxes, scores, levels = [], [], []
    for level, (logit, delta, anchor) in enumerate(zip(logits, deltas, anchors, strict=True)):
        best, where = logit.topk(min(before_nms, logit.shape[1]), dim=1)
        of_best = delta.gather(1, where[:, :, None].expand(-1, -1, 4))  # (B, k, 4)
        decoded = CODER.decode_single(of_best.flatten(0, 1), anchor[where].flatten(0, 1))
        boxes.append(decoded.view_as(of_best))
        scores.append(best)
        levels.append(torch.full_like(where, level))
    cut = cut_to(torch.cat(boxes, dim=1), sizes)
    proposals = []
    for box, score, level in zip(
        cut, torch.cat(scores, dim=1), torch.cat(levels, dim=1), strict=True
    ):
        # A box without area, or with a NaN, is no proposal.
        some = ((box[:, 2:] - box[:, :2]).amin(dim=1) > 0) & score.isfinite()
        box, score, level = box[some], score[some], level[some]
        selected = batched_nms(box, score, level, NMS_IOU)[:after_nms]
        proposals.append(Proposals(box[selected], score[selected]))
    return proposals


def cut_to(boxes: Tensor, sizes: Tensor) -> Tensor:
    """Clips the boxes of each image to the image.

    Args:
        boxes: (B, N, 4): left, top, right, bottom in pixels.
        sizes: (B, 2), height and width of each image.
    """
    limits = sizes.flip(1).to(boxes.dtype).repeat(1, 2)[:, None]  # (B, 1, 4): w, h, w, h
    return torch.minimum(boxes.clamp(min=0), limits)


def rpn_terms(
    logits: Tensor,
    deltas: Tensor,
    anchors: Tensor,
    targets: Sequence[Target],
    draws: NDArray,
    *,
    anchors_per_image: int,
) -> dict[str, tuple[Tensor, int]]:
    """Computes the losses "rpn_cls" and "rpn_box" on anchors that are sampled from each image.

    Args:
        logits: (B, A) float32, objectness of the A anchors of all levels.
        deltas: (B, A, 4) float32, predicted offsets of the boxes from the anchors.
        anchors: (A, 4): left, top, right, bottom in pixels.
        targets: The target of each image.
        draws: (B, 2 * anchors_per_image) uniform random numbers in [0, 1).
        anchors_per_image: Largest number of sampled anchors of an image.

    Returns: {name of the loss: (the loss summed over the batch, number of sampled anchors)}.
    """
    where, labels, positives, target_deltas = [], [], [], []
    for i, target in enumerate(targets):
        matched = match(
            target.boxes,
            target.crowd_boxes,
            anchors,
            positive_iou=POSITIVE_IOU,
            negative_iou=NEGATIVE_IOU,
            best_for_each=True,
        )
        chosen = sample(matched, anchors_per_image, POSITIVE_SHARE, draws[i])
        first = i * len(anchors)
        where += [first + chosen.positives, first + chosen.negatives]
        labels += [torch.ones_like(chosen.positives), torch.zeros_like(chosen.negatives)]
        positives.append(first + chosen.positives)
        objects = target.boxes[matched[chosen.positives]]
        target_deltas.append(CODER.encode_single(objects, anchors[chosen.positives]))
    sampled = torch.cat(where)
    sums = _losses(
        logits, deltas, sampled, torch.cat(labels), torch.cat(positives), torch.cat(target_deltas)
    )
    return {name: (total, len(sampled)) for name, total in sums.items()}


def rpn_shapes_only(logits: Tensor, deltas: Tensor, *, anchors_per_image: int) -> Tensor:
    """Returns the sum of the losses on the largest possible sample, to count FLOPs and memory.

    Args:
        logits: (B, A) float32 of all levels; may be on the meta device.
        deltas: (B, A, 4) float32.
        anchors_per_image: Largest number of sampled anchors of an image.
    """
    count = len(logits) * anchors_per_image
    sampled = torch.zeros(count, dtype=torch.int64, device=logits.device)
    positives = sampled[: int(count * POSITIVE_SHARE)]
    target_deltas = deltas.new_zeros(len(positives), 4)
    sums = _losses(logits, deltas, sampled, sampled, positives, target_deltas)
    return torch.stack(list(sums.values())).sum()


def _losses(
    logits: Tensor,
    deltas: Tensor,
    sampled: Tensor,
    labels: Tensor,
    positives: Tensor,
    target_deltas: Tensor,
) -> dict[str, Tensor]:
    """Returns the losses "rpn_cls" and "rpn_box", each summed over the sampled anchors.

    Args:
        logits: (B, A) float32.
        deltas: (B, A, 4) float32.
        sampled: (n,) int64, indices of the sampled anchors in the flattened batch of B * A anchors.
        labels: (n,), 1 for an anchor that matches an object, else 0.
        positives: (p,) int64, indices of the sampled anchors that match an object.
        target_deltas: (p, 4) float32, offsets of the matched objects from these anchors.
    """
    cls = F.binary_cross_entropy_with_logits(
        logits.flatten()[sampled], labels.float(), reduction="sum"
    )
    box = (deltas.flatten(0, 1)[positives] - target_deltas).abs().sum()
    return {"rpn_cls": cls, "rpn_box": box}
