from __future__ import annotations

import pytest
import torch
from detection_batches import boxes

from fd_large.tasks.detection.heads.box_head import LEAST_SCORE, select


def test_boxes_are_chosen_by_class():
    at = boxes((0, 0, 10, 10), (1, 0, 11, 10), (0, 0, 10, 10))[:, None].repeat(1, 2, 1)
    scores = torch.tensor([[0.9, 0.2], [0.8, LEAST_SCORE / 2], [0.1, 0.6]])
    found, score, label = select(at, scores, torch.tensor([50, 5]), at_most=10)
    assert list(zip(label.tolist(), score.tolist(), strict=True)) == [
        (0, pytest.approx(0.9)),
        (1, pytest.approx(0.6)),
    ]
    assert found[0].tolist() == [0, 0, 5, 10]
    assert len(select(at, scores, torch.tensor([50, 50]), at_most=1)[0]) == 1
