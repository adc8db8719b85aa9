from __future__ import annotations

import numpy as np
import torch
from detection_batches import NO_BOXES, boxes
from torchvision.ops import box_iou

from fd_large.tasks.detection.heads import matching
from fd_large.tasks.detection.heads.matching import (
    BACKGROUND,
    IGNORED,
    choose,
    give_best,
    match,
    sample,
)


def matched(objects, candidates, crowds=NO_BOXES, *, best=False, positive=0.7, negative=0.3):
    return match(
        objects,
        crowds,
        candidates,
        positive_iou=positive,
        negative_iou=negative,
        best_for_each=best,
    ).tolist()


def test_candidates_go_to_the_object_they_overlap_most():
    objects = boxes((0, 0, 10, 10), (20, 0, 30, 10))
    candidates = boxes((0, 0, 10, 9), (20, 0, 30, 5), (21, 1, 30, 10), (50, 50, 60, 60))
    assert matched(objects, candidates) == [0, IGNORED, 1, BACKGROUND]


def test_an_object_that_nothing_overlaps_well_takes_its_nearest():
    objects, candidates = boxes((0, 0, 10, 10)), boxes((0, 0, 4, 4), (0, 0, 5, 4), (8, 8, 20, 20))
    assert matched(objects, candidates) == [BACKGROUND] * 3
    assert matched(objects, candidates, best=True) == [BACKGROUND, 0, BACKGROUND]


def test_an_object_may_have_its_best_candidate_though_another_overlaps_it_more():
    objects = boxes((0, 0, 10, 10), (0, 0, 10, 8))
    candidates = boxes((0, 0, 10, 8), (0, 0, 10, 6))
    found = torch.tensor(matched(objects, candidates, positive=0.5, negative=0.5))
    assert found.tolist() == [1, 1]
    give_best(found, objects, candidates, positive_iou=0.9)
    assert found.tolist() == [1, 1]
    give_best(found, objects[:1], candidates, positive_iou=0.5)
    assert found.tolist() == [0, 1]


def test_an_object_that_nothing_touches_takes_none():
    assert matched(boxes((90, 90, 99, 99)), boxes((0, 0, 4, 4), (5, 5, 9, 9)), best=True) == [
        BACKGROUND,
        BACKGROUND,
    ]


def test_candidates_in_a_crowd_are_no_background():
    crowd = boxes((0, 0, 20, 20))
    candidates = boxes((1, 1, 9, 9), (15, 0, 25, 10), (16, 0, 26, 10), (40, 40, 50, 50))
    assert matched(NO_BOXES, candidates, crowd) == [IGNORED, IGNORED, BACKGROUND, BACKGROUND]
    # One that is for an object stays for it.
    assert matched(boxes((1, 1, 9, 9)), candidates, crowd)[0] == 0


def test_nothing_to_match_is_background():
    assert matched(NO_BOXES, boxes((0, 0, 1, 1))) == [BACKGROUND]
    assert matched(boxes((0, 0, 1, 1)), NO_BOXES) == []


def test_many_objects_are_matched_a_few_at_a_time(monkeypatch):
    """At 1536 pixels 100 objects took 2 GB in one go: 589,248 anchors."""
    generator = torch.Generator().manual_seed(0)
    corner = torch.rand(300, 2, generator=generator) * 80
    places = torch.cat([corner, corner + 5 + torch.rand(300, 2, generator=generator) * 30], dim=1)
    objects, candidates = places[:50], places[50:]
    rows = []

    def counted(some, others):
        rows.append(len(some))
        return box_iou(some, others)

    monkeypatch.setattr(matching, "box_iou", counted)
    found = matched(objects, candidates, best=True)
    assert sum(rows) == 50
    assert max(rows) <= 8
    monkeypatch.setattr(matching, "OBJECTS_AT_ONCE", 50)
    assert matched(objects, candidates, best=True) == found
    assert sum(number >= 0 for number in found) > 20


def test_choices_are_a_permutation_s_start_and_uniform():
    rng = np.random.default_rng(0)
    assert sorted(choose(9, 9, rng.random(9))) == list(range(9))
    counts = np.zeros(10)
    for _ in range(4000):
        chosen = choose(10, 3, rng.random(3))
        assert len(set(chosen)) == 3
        counts[chosen] += 1
    # 1200 each are expected, with a spread of 29.
    assert abs(counts - 1200).max() < 120


def test_a_sample_fills_up_with_background_and_skips_the_ignored():
    numbers = torch.tensor([0] * 6 + [BACKGROUND] * 20 + [IGNORED] * 5)
    draws = np.random.default_rng(0).random(16)
    chosen = sample(numbers, 8, 0.5, draws)
    assert (numbers[chosen.positives] == 0).all()
    assert (numbers[chosen.negatives] == BACKGROUND).all()
    assert (len(chosen.positives), len(chosen.negatives)) == (4, 4)
    few = sample(numbers[5:], 8, 0.5, draws)
    assert (len(few.positives), len(few.negatives)) == (1, 7)
    none = sample(numbers[26:], 8, 0.5, draws)
    assert (len(none.positives), len(none.negatives)) == (0, 0)
