"""HTC beside a plain account: which boxes teach masks, what a mask head sees, the semantic loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detection_batches import batch_of, boxes
from detection_heads import SIZES, STRIDES, heads_and_maps, terms_of

from fd_large.tasks.detection.heads.pooling import pool, pool_one


def test_masks_learn_from_the_boxes_that_their_stage_has_refined():
    heads, maps = heads_and_maps("htc")
    first, second = batch_of(0, (64, 64), [1, 0]).targets.targets
    targets = [first._replace(boxes=boxes((10, 10, 30, 30))), second]
    with torch.no_grad():
        for head in heads.boxes:
            head.boxes.weight.zero_()
        # 8 pixels of 20 to the left, in tenths: from an IoU of 0.43 onto the object.
        heads.boxes[0].boxes.bias[0] = -4
    _, counts = terms_of(heads, maps, [boxes((18, 10, 38, 30)), boxes()], targets)
    # The object itself, and the box that was moved.
    assert [counts[f"mask_{number}"] for number in (1, 2, 3)] == [2, 2, 2]
    _, of_cascade = terms_of(
        heads_and_maps("mmdet")[0], maps, [boxes((18, 10, 38, 30)), boxes()], targets
    )
    assert of_cascade["mask_1"] == 1


def test_a_mask_head_takes_what_the_ones_before_it_made():
    heads, maps = heads_and_maps("htc")
    sought, labels = [boxes((2, 2, 30, 30), (5, 0, 60, 40)), boxes()], torch.tensor([1, 4])
    _, embedding = heads.semantic(maps)
    cuts = pool(maps, STRIDES, sought, 14) + pool_one(embedding, 8, sought, 14)
    logits, passed = [], 0.0
    for number, head in enumerate(heads.mask_heads):
        features = head.convolutions(cuts + passed)
        logits.append(head.logits(features))
        if number < 2:
            passed = F.relu(heads.mask_flows[number](features))
    expected = torch.stack(logits).sigmoid().mean(0)[torch.arange(2), labels]
    found = heads.masks(maps, STRIDES, sought, [labels, labels[:0]])
    torch.testing.assert_close(found[0], expected)


def test_every_eighth_pixel_is_classified_and_all_are_counted():
    heads, maps = heads_and_maps("htc")
    targets = batch_of(0, (64, 64), [1, 1]).targets.targets
    semantic = torch.full((7, 6), 3, dtype=torch.uint8)  # An image of 56 x 48 pixels.
    semantic[0] = 255
    targets[0] = targets[0]._replace(semantic=semantic)
    sums, counts = terms_of(heads, maps, [boxes(), boxes()], targets)
    logits, _ = heads.semantic(maps)
    assert counts["semantic"] == 2 * 8 * 8
    expected = -0.2 * logits[0].log_softmax(0)[3, 1:7, :6].sum()
    torch.testing.assert_close(sums["semantic"], expected)
    assert heads.candidates(maps, STRIDES, [boxes(), boxes()], SIZES)[0].scores.shape == (0, 5)
