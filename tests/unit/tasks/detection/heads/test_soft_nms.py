"""Soft-NMS against the plain loop of its definition."""

from __future__ import annotations

import math

import pytest
import torch
from torchvision.ops import box_iou

from fd_large.tasks.detection.heads.soft_nms import soft_nms


def plain(boxes, scores, labels, *, at_most, decay, iou, sigma, least_score):
    """Class after class, one box after another; then the best of all classes."""
    found = []
    for label in labels.unique():
        left = {int(i): float(scores[i]) for i in torch.where(labels == label)[0]}
        while left:
            best = max(left, key=left.__getitem__)
            found.append((left.pop(best), best))
            for i in list(left):
                overlap = float(box_iou(boxes[best][None], boxes[i][None]))
                if decay == "gaussian":
                    left[i] *= math.exp(-(overlap**2) / sigma)
                elif overlap >= iou:
                    left[i] *= 1 - overlap
                if left[i] < least_score:
                    del left[i]
    return sorted(found, reverse=True)[:at_most]


@pytest.mark.parametrize("decay", ["linear", "gaussian"])
@pytest.mark.parametrize("at_most", [1, 25, 1000])
def test_it_is_the_plain_loop(decay, at_most):
    torch.manual_seed(0)
    corner = torch.rand(120, 2) * 40
    boxes = torch.cat([corner, corner + 5 + torch.rand(120, 2) * 30], dim=1)
    scores, labels = 0.01 + torch.rand(120), torch.randint(4, (120,))
    how = {"decay": decay, "iou": 0.4, "sigma": 0.3, "least_score": 0.02, "at_most": at_most}
    scores[7] = 0.005  # Below the least from the start.
    rows, lowered = soft_nms(boxes, scores, labels, **how)
    expected = plain(boxes, scores, labels, **how)
    assert rows.tolist() == [row for _, row in expected if row != 7]
    assert lowered.tolist() == pytest.approx([s for s, row in expected if row != 7], rel=1e-5)


def test_nothing_is_chosen_of_nothing():
    none = torch.zeros(0, dtype=torch.int64)
    rows, scores = soft_nms(torch.zeros(0, 4), torch.zeros(0), none, at_most=5)
    assert (len(rows), len(scores)) == (0, 0)
