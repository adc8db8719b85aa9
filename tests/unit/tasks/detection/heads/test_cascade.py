"""Cascades beside a plain account: what a stage learns from, and what a test averages."""

from __future__ import annotations

import pytest
import torch
from detection_batches import batch_of, boxes
from detection_heads import SIZES, STRIDES, heads_and_maps, terms_of
from torchvision.ops import generalized_box_iou_loss

from fd_large.tasks.detection.heads.box_head import giou_loss
from fd_large.tasks.detection.heads.pooling import pool

OBJECT = (10.0, 10.0, 30.0, 30.0)
# They overlap the object by 0.75, 0.65, 0.55 and 0.
PROPOSALS = [(10.0, 10.0, 25.0, 30.0), (10, 10, 23, 30), (10, 10, 21, 30), (40, 40, 60, 60)]


def standing_still(kind: str):
    """Heads that leave boxes where they are."""
    heads, maps = heads_and_maps(kind)
    for head in heads.boxes:
        torch.nn.init.zeros_(head.boxes.weight)
    return heads, maps


@pytest.mark.parametrize(
    ("kind", "masks", "rows"), [("mmdet", [4, 3, 2], [5, 5, 5]), ("detectron2", [4], [5, 5, 5])]
)
def test_every_stage_is_more_exacting(kind, masks, rows):
    heads, maps = standing_still(kind)
    first, second = batch_of(0, (64, 64), [1, 0]).targets.targets
    targets = [first._replace(boxes=boxes(OBJECT)), second]
    sums, counts = terms_of(heads, maps, [boxes(*PROPOSALS), boxes()], targets)
    # The object itself is among them, at every stage once.
    assert [counts[f"cls_{i}"] for i in (1, 2, 3)] == rows
    assert [count for name, count in counts.items() if "mask" in name] == masks
    assert all(total > 0 for total in sums.values())


@pytest.mark.parametrize("kind", ["mmdet", "detectron2"])
def test_a_test_averages_logits_or_probabilities(kind):
    heads, maps = standing_still(kind)
    proposals = [boxes(*PROPOSALS), boxes(OBJECT)]
    found = heads.candidates(maps, STRIDES, proposals, SIZES)
    cuts = pool(maps, STRIDES, proposals, 7)
    logits = torch.stack([head(cuts)[0] for head in heads.boxes])
    averaged = logits.mean(0).softmax(1) if kind == "mmdet" else logits.softmax(2).mean(0)
    torch.testing.assert_close(torch.cat([of.scores for of in found]), averaged[:, :-1])
    assert torch.cat([of.boxes for of in found])[:, 0].tolist() == torch.cat(proposals).tolist()
    labels = [torch.tensor([0, 1, 2, 3]), torch.tensor([4])]
    masks = torch.stack([head(pool(maps, STRIDES, proposals, 14)) for head in heads.mask_heads])
    expected = masks.sigmoid().mean(0)[torch.arange(5), torch.cat(labels)]
    torch.testing.assert_close(torch.cat(heads.masks(maps, STRIDES, proposals, labels)), expected)


def test_the_loss_of_boxes_is_torchvision_s():
    generator = torch.Generator().manual_seed(0)
    corners = 60 * torch.rand(2, 50, 2, generator=generator)
    pair = torch.cat([corners, corners + 40 * torch.rand(2, 50, 2, generator=generator)], dim=2)
    pair = pair.double()
    torch.testing.assert_close(giou_loss(*pair), generalized_box_iou_loss(*pair))
    assert giou_loss(pair[0], pair[0]).abs().max() < 1e-6


def test_boxes_are_cut_to_their_image_between_stages():
    heads, maps = heads_and_maps("mmdet")
    torch.nn.init.constant_(heads.boxes[0].boxes.bias, 50.0)  # Very large.
    given = []
    heads._stage = lambda *of, own=heads._stage: given.append(of[2]) or own(*of)
    heads.candidates(maps, STRIDES, [boxes(OBJECT)] * 2, torch.tensor([[64, 64], [40, 50]]))
    assert [roi.tolist() for roi in given[1]] == [[[0, 0, 64, 64]], [[0, 0, 50, 40]]]
