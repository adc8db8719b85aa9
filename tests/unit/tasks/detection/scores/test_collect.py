from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from detection_batches import boxes

from fd_large.errors import DataError
from fd_large.ranks import distributed
from fd_large.tasks.detection.data import masks
from fd_large.tasks.detection.heads.selection import Detections
from fd_large.tasks.detection.scores.collect import keep_shard, paste, to_results
from fd_large.tasks.detection.scores.results import read_results, shard_of
from fd_large.tasks.detection.scores.score_shards import NOTE, Note

CATEGORIES = (3, 7, 90)


def seen(boxes, *, probability: float = 1.0) -> Detections:
    boxes = torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)
    count = len(boxes)
    return Detections(
        boxes,
        torch.linspace(0.9, 0.5, count),
        torch.arange(count) % 3,
        torch.full((count, 28, 28), probability),
    )


def test_boxes_and_masks_are_drawn_in_the_pictures_own_pixels():
    results = to_results(
        seen([[40, 40, 120, 80], [0, 0, 200, 120]]),
        image_id=17,
        original_size=torch.tensor([120, 200]),
        category_ids=CATEGORIES,
    )
    assert [r["bbox"] for r in results] == [[40, 40, 80, 40], [0, 0, 200, 120]]
    assert [r["category_id"] for r in results] == [3, 7]
    assert [r["image_id"] for r in results] == [17, 17]
    assert [r["score"] for r in results] == pytest.approx([0.9, 0.5])
    for r, box in zip(results, ([40, 40, 120, 80], [0, 0, 200, 120]), strict=True):
        assert r["segmentation"]["size"] == [120, 200]
        mask = masks.decompress(r["segmentation"]["counts"].encode(), 120, 200)
        expected = np.zeros((120, 200))
        expected[box[1] : box[3], box[0] : box[2]] = 1
        # The outermost pixels lie on the mask's blurred edge.
        assert (mask != expected).sum() <= 2 * (box[2] - box[0] + box[3] - box[1])


def test_boxes_are_cut_at_the_picture_and_no_masks_at_all_are_fine():
    (result,) = to_results(
        seen([[-5, 10, 70, 40]]), image_id=1, original_size=(60, 50),
        category_ids=CATEGORIES,
    )  # fmt: skip
    assert result["bbox"] == [0, 10, 50, 30]
    nothing = to_results(seen([]), image_id=1, original_size=(60, 50), category_ids=CATEGORIES)
    assert nothing == []


def test_more_masks_than_are_pasted_at_once_keep_their_order():
    boxes = [[n, n, n + 10, n + 12] for n in range(25)]
    results = to_results(seen(boxes), image_id=1, original_size=(60, 60), category_ids=CATEGORIES)
    for (left, top, *_), result in zip(boxes, results, strict=True):
        mask = masks.decompress(result["segmentation"]["counts"].encode(), 60, 60)
        rows, columns = np.nonzero(mask)
        assert abs(rows.mean() - (top + 5.5)) < 1
        assert abs(columns.mean() - (left + 4.5)) < 1


def test_a_mask_fills_its_box():
    masks = torch.ones(3, 4, 4)
    masks[1, :, 2:] = 0
    at = boxes((2, 1, 6, 5), (0, 0, 8, 8), (-4, 6, 3, 14))
    pasted = paste(masks, at, 8, 10)
    assert pasted.shape == (3, 8, 10)
    wanted = torch.zeros(8, 10, dtype=torch.bool)
    wanted[1:5, 2:6] = True
    assert torch.equal(pasted[0], wanted)
    assert torch.equal(pasted[1].sum(0), torch.tensor([8, 8, 8, 8, 0, 0, 0, 0, 0, 0]))
    assert pasted[2].sum() == 2 * 3
    assert pasted[2][6:, :3].all()


def entry(image):
    return {"image_id": image, "category_id": 3, "bbox": [1, 2, 3, 4], "score": 0.5}


def test_each_rank_keeps_its_results_and_rank_0_the_note(tmp_path, monkeypatch):
    shards = [[entry(0), entry(2)], [entry(1)]]
    for rank in (1, 0):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        keep_shard(shards[rank], tmp_path, Note(2, 1, "at 800 px"))
        assert (tmp_path / NOTE).exists() == (rank == 0)
    assert [read_results(shard_of(tmp_path, rank)) for rank in (0, 1)] == shards
    assert Note(**json.loads((tmp_path / NOTE).read_text())) == (2, 1, "at 800 px")


def test_results_that_cannot_be_written_end_all_ranks_alike(tmp_path):
    (tmp_path / "file").touch()
    again = r"cannot be written; got .* start the same command again"
    with pytest.raises(DataError, match=again) as caught:
        keep_shard([], tmp_path / "file", Note(1, 0, ""))
    assert caught.value.agreed
