from __future__ import annotations

import json
import math
from collections import Counter

import numpy as np
import pretended_ranks
import pytest
import torch
from segmentation_twin import write_images

from fd_large.errors import DataError
from fd_large.probes.redrawn import read, redraws
from fd_large.tasks.dense.evaluation import predict_some
from fd_large.tasks.segmentation.data.classes import classes_of
from fd_large.tasks.segmentation.data.dataset import open_segmentation
from fd_large.tasks.segmentation.data.views import TestViews
from fd_large.tasks.segmentation.scores.areas import m_iou, scores_of
from fd_large.tasks.segmentation.scores.evaluation import Model, evaluate, keep

COLORS = torch.tensor([[220, 40, 40], [40, 200, 40], [40, 40, 220], [128, 128, 128]])


def nearest_color(images: torch.Tensor) -> torch.Tensor:
    """The class of the nearest colour, as logits: a model that needs no training."""
    return (
        -torch.cdist(
            images.permute(0, 2, 3, 1).float().flatten(1, 2),
            COLORS.float().expand(len(images), -1, -1),
        )
        .unflatten(1, images.shape[-2:])
        .permute(0, 3, 1, 2)
    )


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return write_images(tmp_path_factory.mktemp("ade"), 5)


@pytest.fixture(scope="module")
def images(root):
    return open_segmentation(
        str(root), "val", num_classes=4, ignore_value=255, reduce_zero_label=True
    )


@pytest.mark.parametrize(
    "views",
    [
        TestViews(72, 200),
        TestViews(48, 200, (1.0, 1.5), True),
        TestViews(72, 0, crop=48, stride=30),
    ],
    ids=["whole", "several", "windows"],
)
def test_any_number_of_ranks_gives_the_same_and_makes_as_many_forwards(images, views, monkeypatch):
    forwards: Counter[int] = Counter()

    def counted(pixels: torch.Tensor) -> torch.Tensor:
        forwards[pretended_ranks.rank()] += 1
        return nearest_color(pixels)

    model = Model(counted, views, 2)
    alone = evaluate(model, images, workers=0)
    assert alone.scores.m_iou > 85
    assert alone.unread == 0
    for ranks in (2, 3):
        forwards.clear()
        world = pretended_ranks.World(monkeypatch, ranks)
        for outcome in world.run(lambda: evaluate(model, images, workers=0)):
            assert np.array_equal(outcome.scores.counts, alone.scores.counts)
            assert np.array_equal(outcome.errors, alone.errors, equal_nan=True)
        assert len(set(forwards.values())) == 1


def test_scores_and_pictures_are_kept(root, images, tmp_path):
    model = Model(nearest_color, TestViews(36, 200))
    outcome = evaluate(model, images, workers=0)
    some = predict_some(outcome.errors, model, images)
    drawn = keep(outcome, some, images, classes_of(str(root), 4, ""), tmp_path)
    assert [path.name for path in drawn] == ["worst.png", "chosen.png", "confusion.png"]
    assert all(path.stat().st_size > 5000 for path in drawn)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert scores["mIoU"] == outcome.scores.m_iou
    redrawn = read(tmp_path, "val_mIoU")
    assert redrawn.score == outcome.scores.m_iou
    assert m_iou(*outcome.areas.sum(0)) == outcome.scores.m_iou
    counts = redraws(len(images))[7]
    areas = sum(count * areas for count, areas in zip(counts, outcome.areas, strict=True))
    assert redrawn.draws[7] == m_iou(*areas)
    assert redrawn.draws.std() > 0
    assert [one["name"] for one in scores["classes"]] == ["red", "green", "blue", "grey"]
    assert sum(one["pixels"] for one in scores["classes"]) == np.sum(scores["confusion"])


def test_ranks_make_as_many_forwards_where_an_image_cannot_be_read_again(images, monkeypatch):
    forwards: Counter[int] = Counter()

    def counted(pixels: torch.Tensor) -> torch.Tensor:
        forwards[pretended_ranks.rank()] += 1
        return nearest_color(pixels)

    model = Model(counted, TestViews(72, 0, crop=48, stride=30))
    outcome = evaluate(model, images, workers=0)
    forwards.clear()
    sample = images.sample

    def flaky(index: int):
        if index == 2:
            raise DataError("gone")
        return sample(index)

    monkeypatch.setattr(images, "sample", flaky)
    world = pretended_ranks.World(monkeypatch, 2)
    some, nothing = world.run(lambda: predict_some(outcome.errors, model, images))
    assert {index for seen in some.values() for index in seen} == {0, 1, 3, 4}
    assert not any(nothing.values())
    assert forwards[0] == forwards[1] > 0


def test_an_image_that_cannot_be_read_is_left_out(tmp_path):
    root = write_images(tmp_path, 3)
    images = open_segmentation(
        str(root), "val", num_classes=4, ignore_value=255, reduce_zero_label=True
    )
    (root / "images/validation/0001.jpg").write_bytes(b"broken")
    outcome = evaluate(Model(nearest_color, TestViews(36, 200)), images, workers=0)
    assert outcome.unread == 1
    assert np.isnan(outcome.errors).tolist() == [False, True, False]


def test_nothing_is_labelled():
    scores = scores_of(np.zeros((3, 3), np.int64))
    assert all(math.isnan(value) for value in scores.numbers().values())
