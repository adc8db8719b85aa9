"""What arrives from a loading process, and how many descriptors that takes."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from torch.utils.data import Dataset

from fd_large.data.loader import Batch, load_batches


class Objects(NamedTuple):
    boxes: list[torch.Tensor]
    more: dict[str, torch.Tensor]
    count: int


class Batches(Dataset):
    """Batches of images with objects, of which some are empty or not contiguous."""

    def __getitem__(self, number):
        boxes = [torch.arange(4.0 * n).view(n, 4) + number for n in range(64)]
        more = {
            "bool": torch.tensor([True, False]),
            "wide": torch.arange(6).view(2, 3).T,
            "none": torch.zeros(0, 5, 5, dtype=torch.uint8),
            "scalar": torch.tensor(2.5, dtype=torch.float64),
        }
        images = torch.full((2, 3, 5, 7), number, dtype=torch.uint8)
        place = torch.tensor([number])
        return Batch(images, 3, place, place.clone(), ("bad",), Objects(boxes, more, number))


@pytest.fixture
def loaded():
    return lambda workers, count=8: list(load_batches(Batches(), range(count), workers=workers))


def tensors_of(batch):
    of = batch.targets
    return [batch.images, batch.positions, batch.indices, *of.boxes, *of.more.values()]


def test_a_batch_arrives_as_it_was(loaded):
    for here, there in zip(loaded(0), loaded(2), strict=True):
        assert (there.epoch, there.bad, there.targets.count) == (3, ("bad",), here.targets.count)
        for one, other in zip(tensors_of(here), tensors_of(there), strict=True):
            assert one.dtype == other.dtype
            assert torch.equal(one, other)
            other.add_(1 if other.dtype != torch.bool else False)  # Its own memory to write to.


def shared_memories() -> int:
    """Descriptors of this process that are torch's shared memory."""
    links = (Path("/proc/self/fd", number) for number in os.listdir("/proc/self/fd"))
    return sum("torch_" in os.readlink(link) for link in links if link.is_symlink())


def test_a_batch_takes_one_descriptor(loaded):
    held = loaded(2)
    assert 0 < shared_memories() <= len(held)
    del held


def test_what_is_no_tensor_travels_too():
    class Arrays(Dataset):
        def __getitem__(self, number):
            return np.full(3, number), "text", None

    (found,) = load_batches(Arrays(), [5], workers=1)
    assert found[0].tolist() == [5, 5, 5]
    assert found[1:] == ("text", None)
