"""Matches candidates (anchors or proposals) to objects, and samples candidates for the losses.

Random choices depend only on seed, epoch and the image's position in the epoch, so that they are
the same for any number of ranks.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torchvision.ops import box_area, box_iou

from fd_large.engine.zero.private_names import get

Matcher = get("torchvision.models.detection._utils:Matcher")
BACKGROUND = Matcher.BELOW_LOW_THRESHOLD  # -1
IGNORED = Matcher.BETWEEN_THRESHOLDS  # -2
# Share of a candidate inside a crowd from which it does not count as background, since the objects
# there are not annotated.
CROWD_SHARE = 0.5
OBJECTS_AT_ONCE = 8


def match(
    boxes: Tensor,
    crowd_boxes: Tensor,
    candidates: Tensor,
    *,
    positive_iou: float,
    negative_iou: float,
    best_for_each: bool,
) -> Tensor:
    """Returns for each candidate the index of its object, `BACKGROUND` or `IGNORED`, (N,) int64.

    A candidate matches the object that it overlaps most, if their IoU is large enough.

    Args:
        boxes: (n, 4), the objects' boxes: left, top, right, bottom; n may be 0.
        crowd_boxes: (m, 4), regions whose objects are not annotated. A background candidate is
            ignored if at least `CROWD_SHARE` of its area lies in a crowd.
        candidates: (N, 4): left, top, right, bottom.
        positive_iou: Smallest IoU at which a candidate matches an object.
        negative_iou: IoU below which a candidate is background. A candidate whose IoU is between
            the two thresholds is ignored.
        best_for_each: Whether the candidate of highest IoU with an object also matches if this IoU
            is below `positive_iou`. The candidate then matches the object that it overlaps most,
            which may be another object.
    """
    if len(boxes) and len(candidates):
        matcher = Matcher(positive_iou, negative_iou, allow_low_quality_matches=best_for_each)
        # Some objects at a time, since intermediate results are ten times as large as the IoU.
        some = boxes.split(OBJECTS_AT_ONCE)
        overlap = torch.cat([box_iou(part, candidates) for part in some])
        matched = matcher(overlap)
        # An object that no candidate overlaps would match them all, each being its best at IoU 0.
        matched[overlap.amax(dim=0) <= 0] = BACKGROUND
    else:
        matched = torch.full_like(candidates[:, 0], BACKGROUND, dtype=torch.int64)
    if len(crowd_boxes):
        corner = torch.maximum(crowd_boxes[:, None, :2], candidates[None, :, :2])
        opposite = torch.minimum(crowd_boxes[:, None, 2:], candidates[None, :, 2:])
        shared = (opposite - corner).clamp(min=0).prod(dim=2)  # (m, N)
        crowded = (shared >= CROWD_SHARE * box_area(candidates)).any(dim=0)
        matched[crowded & (matched == BACKGROUND)] = IGNORED
    return matched


def give_best(matched: Tensor, boxes: Tensor, candidates: Tensor, *, positive_iou: float) -> None:
    """Matches each object to its candidates of highest IoU.

    A candidate is matched even if it overlaps another object more.

    Args:
        matched: (N,) int64, the result of `match`, which is changed in place.
        boxes: (n, 4), the objects' boxes: left, top, right, bottom.
        candidates: (N, 4): left, top, right, bottom.
        positive_iou: An object is matched in this way if its highest IoU with a candidate is at
            least this value.

    Source: mmdetection's MaxIoUAssigner with match_low_quality.
    """
    if not len(candidates):
        return
    for number, box in enumerate(boxes):
        overlap = box_iou(box[None], candidates)[0]
        best = overlap.max()
        matched[(overlap == best) & (best >= positive_iou)] = number


class Sample(NamedTuple):
    """Indices of the candidates that are sampled for the losses.

    Attributes:
        positives: (p,) int64, indices of candidates that match an object.
        negatives: (q,) int64, indices of background candidates.
    """

    positives: Tensor
    negatives: Tensor


def sample(matched: Tensor, count: int, positive_share: float, draws: NDArray) -> Sample:
    """Samples up to `count` candidates of an image, with a limited share of positives.

    Args:
        matched: (N,) int64, the result of `match`.
        count: Largest number of sampled candidates, positives and background together.
        positive_share: Largest share of positives in `count`; background fills the rest.
        draws: (2 * count,) uniform random numbers in [0, 1).
    """
    positives = torch.where(matched >= 0)[0]
    negatives = torch.where(matched == BACKGROUND)[0]
    num_positives = min(len(positives), int(count * positive_share))
    num_negatives = min(len(negatives), count - num_positives)
    return Sample(
        positives[_chosen(len(positives), num_positives, draws[:count], matched.device)],
        negatives[_chosen(len(negatives), num_negatives, draws[count:], matched.device)],
    )


def choose(total: int, count: int, draws: NDArray) -> NDArray[np.int64]:
    """Draws `count` distinct integers from 0 to `total - 1` by a partial Fisher-Yates shuffle.

    Only the changes to the list 0, 1, 2, ... are stored, so that the work is proportional to
    `count`.

    Args:
        total: Number of integers to draw from.
        count: Number of integers to draw, at most `total`.
        draws: (count,) or more uniform random numbers in [0, 1).

    Returns: (count,) int64, in random order.
    """
    moved: dict[int, int] = {}
    chosen = np.empty(count, dtype=np.int64)
    for i in range(count):
        j = i + int(draws[i] * (total - i))
        chosen[i] = moved.get(j, j)
        moved[j] = moved.get(i, i)
    return chosen


def _chosen(total: int, count: int, draws: NDArray, device: torch.device) -> Tensor:
    if count == total:  # All, in their order: nothing is left to chance.
        return torch.arange(total, device=device)
    return torch.from_numpy(choose(total, count, draws)).to(device, non_blocking=True)
