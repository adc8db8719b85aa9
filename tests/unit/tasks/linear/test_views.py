"""Whole groups of images for the statistics of the norm."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch

from fd_large.tasks.classification.views import Labelled
from fd_large.tasks.linear.views import GroupedBatches


def load(positions):
    """An image is its position; the label is ten times as much."""
    at = torch.from_numpy(positions)
    return Labelled(at.byte(), at + 100, 10 * at, tuple((f"bad {p}",) for p in positions))


def test_a_micro_batch_that_ends_inside_a_group_brings_the_rest():
    batches = GroupedBatches(SimpleNamespace(load=load, epoch=3), 4)
    batch = batches[np.arange(6, 10)]
    assert batch.images.tolist() == [4, 5, 6, 7, 8, 9, 10, 11]
    places = batch.targets["places"]
    assert batch.images[places].tolist() == batch.positions.tolist() == [6, 7, 8, 9]
    assert batch.targets["labels"].tolist() == [60, 70, 80, 90]
    assert batch.indices.tolist() == [106, 107, 108, 109]
    # What is bad among the others is their own micro batches' to count.
    assert batch.bad == ("bad 6", "bad 7", "bad 8", "bad 9")
