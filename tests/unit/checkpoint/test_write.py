"""The saver: what was is written while training goes on, all of it or nothing."""

import pytest
import torch

from fd_large.checkpoint import store
from fd_large.checkpoint.layout import EachTensor
from fd_large.checkpoint.read import newest_sound
from fd_large.checkpoint.write import Piece, Saver


@pytest.fixture
def save(folder):
    """Writes a checkpoint after so many steps; returns whether it is complete."""

    def save(update, *, world_size=1):
        saver, tensor = Saver(folder, keep_last=2, keep_every=0), torch.full((5,), 7.0)
        layout = EachTensor({"w": 5}, world_size).to_dict()
        manifest = {"update": update, "samples": 4, "zero_stage": 3, "layout": layout}
        saver.begin({**manifest, "world_size": world_size}, [Piece("master.w", tensor)])
        tensor.zero_()  # Training goes on.
        saver.wait()
        written = saver.finish(failed_anywhere=saver.failed)
        saver.close()
        return written

    return save


def test_what_was_is_read_back_and_old_ones_go(save, folder, updates_left):
    assert all(save(update) for update in (1, 2, 3))
    assert updates_left() == [2, 3]
    reader, complaints = newest_sound(folder, lambda layout: {0})
    assert complaints == []
    assert reader.manifest["update"] == 3
    assert reader.read("master", "w", 1, 4).tolist() == [7.0, 7.0, 7.0]
    assert reader.read("master", "w", 2, 2).numel() == 0
    modes = {path.stat().st_mode & 0o777 for path in reader.path.iterdir()}
    assert len(modes) == 1, "as the user's umask says"
    assert not list(folder.rglob("*.part"))


def test_a_write_that_fails_leaves_the_old_ones(save, folder, updates_left, monkeypatch):
    save(1)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fd_large.checkpoint.write.save_file", full)
    assert not save(2)
    assert updates_left() == [1]
    assert not list(folder.rglob("*.part"))


def test_nothing_is_complete_without_every_ranks_files(save, folder):
    assert not save(2, world_size=2), "rank 1 wrote elsewhere"
    assert store.complete(folder) == []
