"""A run's folder with checkpoints of one small tensor."""

import pytest
import torch
from stored_run import store_tensors

from fd_large.checkpoint import store
from fd_large.checkpoint.lease import claimed


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "recipe.json").write_text('{"runtime": {"keep_last": 2, "keep_every": 4}}')
    return tmp_path


@pytest.fixture
def stored(folder):
    """Stores a checkpoint of `w` after each of some steps, filled with their number."""

    def write(*updates, ranks=1):
        for update in updates:
            tensors = {"w": torch.full((5,), float(update))}
            path = store_tensors(folder, tensors, update=update, ranks=ranks)
        return path

    return write


@pytest.fixture
def lease(folder):
    """The right to write the folder."""
    with claimed(folder) as held:
        yield held


@pytest.fixture
def updates_left(folder):
    return lambda: [item.update for item in store.complete(folder)]
