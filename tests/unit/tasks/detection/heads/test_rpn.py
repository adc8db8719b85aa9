from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detection_batches import batch_of, boxes
from torchvision.ops import box_iou

from fd_large.tasks.detection.heads.rpn import CODER, anchors_of, propose, rpn_terms

CPU = torch.device("cpu")


def test_anchors_stand_on_the_strides_of_odd_maps():
    fine, coarse = anchors_of(((3, 5), (2, 3)), (4.0, 8.0), CPU)
    assert fine.shape == (3 * 5 * 3, 4)
    square = fine.view(3, 5, 3, 4)[:, :, 1]
    assert square[2, 4].tolist() == [4 * 4 - 16, 2 * 4 - 16, 4 * 4 + 16, 2 * 4 + 16]
    assert (coarse.view(2, 3, 3, 4)[1, 2, 1] + coarse.new_tensor([32, 32, -32, -32])).tolist() == [
        16, 8, 16, 8,
    ]  # fmt: skip
    # Height to width as 2 to 1, of the square's area.
    tall = fine.view(3, 5, 3, 4)[0, 0, 2]
    height, width = (tall[3] - tall[1]).item(), (tall[2] - tall[0]).item()
    assert (height / width, height * width) == pytest.approx((2, 32**2))


def proposals_from(logits, deltas, anchors, size=(100, 100), *, before=100, after=100):
    return propose(
        [logits],
        [deltas],
        [anchors],
        torch.tensor([size]),
        before_nms=before,
        after_nms=after,
    )[0].boxes


def test_proposals_are_cut_sorted_and_thinned():
    anchors = boxes((-5, 10, 20, 30), (-5, 10, 20, 31), (40, 40, 60, 60), (200, 0, 220, 20))
    logits, deltas = torch.tensor([[1.0, 2.0, 3.0, 4.0]]), torch.zeros(1, 4, 4)
    found = proposals_from(logits, deltas, anchors)
    # The last lies outside, the first is a copy of the better second.
    assert found.tolist() == [[40, 40, 60, 60], [0, 10, 20, 31]]
    assert len(proposals_from(logits, deltas, anchors, after=1)) == 1
    moved = proposals_from(logits, deltas + torch.tensor([0.5, 0, 0, 0]), anchors)
    assert moved[0].tolist() == [50, 40, 70, 60]


def test_no_proposal_comes_of_numbers_that_are_none():
    anchors = boxes((0, 0, 20, 30), (40, 40, 60, 60))
    nothing = torch.tensor([[torch.nan, 1.0]])
    assert len(proposals_from(nothing, torch.zeros(1, 2, 4), anchors)) == 1
    assert len(proposals_from(nothing[:, 1:], torch.full((1, 1, 4), torch.nan), anchors[1:])) == 0
    assert len(proposals_from(torch.zeros(1, 2), torch.zeros(1, 2, 4), anchors, (0, 0))) == 0


def test_losses_of_proposals_equal_the_definition():
    batch = batch_of(3, (64, 96), [3, 0])
    anchors = torch.cat(anchors_of(((16, 24), (8, 12)), (4.0, 8.0), CPU))
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, len(anchors), generator=generator)
    deltas = torch.randn(2, len(anchors), 4, generator=generator)
    # As many draws as there are anchors: all that are no matter of doubt are looked at.
    count = 2 * len(anchors)
    draws = np.random.default_rng(0).random((2, 2 * count))
    terms = rpn_terms(
        logits, deltas, anchors, batch.targets.targets, draws, anchors_per_image=count
    )
    cls = box = looked_at = 0.0
    for i, target in enumerate(batch.targets.targets):
        overlap = (
            box_iou(anchors, target.boxes) if len(target.boxes) else torch.zeros(len(anchors), 1)
        )
        best = overlap.amax(dim=0)
        for a, row in enumerate(overlap):
            nearest = bool(((row == best) & (row > 0)).any())
            positive = row.max() >= 0.7 or nearest
            if positive or row.max() < 0.3:
                looked_at += 1
                cls += F.softplus(-logits[i, a] if positive else logits[i, a]).item()
            if positive:
                wanted = CODER.encode_single(target.boxes[row.argmax()][None], anchors[a][None])
                box += (deltas[i, a] - wanted[0]).abs().sum().item()
    for name, expected in (("rpn_cls", cls), ("rpn_box", box)):
        total, count = terms[name]
        assert count == looked_at
        assert total.item() == pytest.approx(expected, rel=1e-4)
