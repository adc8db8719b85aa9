"""The choice of boxes: by class, with one box of an object, in images of their size."""

from __future__ import annotations

import pytest
import torch
from detection_batches import boxes

from fd_large.tasks.detection.heads.selection import Chosen, Selection, rescored

THREE = boxes((0, 0, 10, 10), (1, 0, 11, 10), (0, 0, 10, 10))
SCORES = torch.tensor([[0.9, 0.2], [0.8, 0.02], [0.1, 0.6]])


@pytest.mark.parametrize("columns", [1, 2])
def test_boxes_are_chosen_by_class(columns):
    at = THREE[:, None].repeat(1, columns, 1)
    found, score, label = Selection().of_candidates(at, SCORES, torch.tensor([50, 5]))
    assert label.tolist() == [0, 1]
    assert score.tolist() == pytest.approx([0.9, 0.6])
    assert found[0].tolist() == [0, 0, 5, 10]
    one = Selection(at_most=1).of_candidates(at, SCORES, torch.tensor([50, 50]))
    assert len(one.boxes) == 1


def test_soft_nms_keeps_neighbours_with_lower_scores():
    at, size = THREE[:, None], torch.tensor([50, 50])
    soft = Selection(nms="linear", least_score=0.001).of_candidates(at, SCORES, size)
    # The second box overlaps the first one by 9/11; the third one is the first one's equal.
    assert soft.labels.tolist() == [0, 1, 0, 1]
    expected = [0.9, 0.6, 0.8 * (1 - 9 / 11), 0.02 * (1 - 9 / 11)]
    assert soft.scores.tolist() == pytest.approx(expected)


def test_the_score_of_a_box_follows_its_mask():
    masks = torch.tensor([[[0.9, 0.7], [0.4, 0.0]], [[0.1, 0.2], [0.3, 0.5]]])
    assert rescored(torch.tensor([0.5, 1.0]), masks).tolist() == pytest.approx([0.4, 0.0])
    chosen = Chosen(THREE[:2], torch.tensor([1.0, 0.5]), torch.tensor([0, 1]))
    seen = Selection(rescored=True).detections(chosen, masks.flip(0))
    assert seen.labels.tolist() == [1, 0]
    assert seen.scores.tolist() == pytest.approx([0.4, 0.0])
    assert Selection().detections(chosen, masks).scores.tolist() == [1.0, 0.5]
