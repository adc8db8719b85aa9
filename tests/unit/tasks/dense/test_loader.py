from __future__ import annotations

import numpy as np
import pytest
import torch
from segmentation_twin import write_images

from fd_large.tasks.dense.loader import (
    TestImages,
    TrainingBatches,
    build_test_loader,
    deal,
)
from fd_large.tasks.segmentation.data.dataset import open_segmentation
from fd_large.tasks.segmentation.data.views import TestViews, TrainingViews
from fd_large.tasks.segmentation.loss import IGNORED

VIEWS = TrainingViews(48, (0.5, 2.0), 0.75, True)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = write_images(tmp_path_factory.mktemp("ade"))
    return open_segmentation(
        str(root), "train", num_classes=4, ignore_value=255, reduce_zero_label=True
    )


def test_a_view_follows_from_its_position_alone(images):
    batches = TrainingBatches(images, VIEWS, 3, 1)
    whole, half = batches[np.arange(6)], batches[np.arange(3, 6)]
    assert torch.equal(whole.images[3:], half.images)
    assert torch.equal(whole.targets.truth[3:], half.targets.truth)
    other = TrainingBatches(images, VIEWS, 3, 2)[np.arange(6)]
    assert not torch.equal(whole.images, other.images)
    assert whole.images.shape == (6, 3, 48, 48)
    for labels, (height, width) in zip(
        whole.targets.truth, whole.targets.sizes.tolist(), strict=True
    ):
        assert labels[height:].eq(IGNORED).all()
        assert labels[:, width:].eq(IGNORED).all()
        assert labels.max() < 4


def test_where_no_image_can_be_read_nothing_is_learnt(images, monkeypatch):
    from fd_large.errors import DataError
    from fd_large.tasks.segmentation.data import dataset

    def sample(self, index):
        raise DataError("broken")

    monkeypatch.setattr(dataset.SegmentationSet, "sample", sample)
    batch = TrainingBatches(images, VIEWS, 0, 0)[np.arange(2)]
    assert batch.targets.truth.eq(IGNORED).all()
    assert len(batch.bad) == 20
    assert TestImages(images, TestViews(48, 96))[0].bad == "broken"


def test_batches_are_dealt_in_turn():
    dealt = [deal(11, batch_size=2, rank=rank, world_size=2) for rank in range(2)]
    assert [[batch.tolist() for batch in of_rank] for of_rank in dealt] == [
        [[0, 1], [4, 5], [8, 9]],
        [[2, 3], [6, 7], [10, -1]],
    ]


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_every_image_is_tested_once(images, world_size):
    seen = [
        [
            item.index
            for item in build_test_loader(
                images, TestViews(48, 96), rank=rank, world_size=world_size, workers=0
            )
        ]
        for rank in range(world_size)
    ]
    assert len({len(indices) for indices in seen}) == 1
    assert sorted(i for indices in seen for i in indices if i >= 0) == list(range(6))
