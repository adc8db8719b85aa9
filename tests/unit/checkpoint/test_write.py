"""The saver: what was is written while training goes on, all of it or nothing."""

import errno

import pytest
import torch
from faults import watching

from fd_large import files
from fd_large.checkpoint import read, store
from fd_large.checkpoint.layout import EachTensor
from fd_large.checkpoint.read import newest_sound
from fd_large.checkpoint.write import Piece, Saver


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(read, "SECONDS_BETWEEN_TRIES", 0.0)
    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0))


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
    reader, complaints = newest_sound(folder)
    assert complaints == []
    assert reader.manifest["update"] == 3
    assert reader.read("master", "w", 1, 4).tolist() == [7.0, 7.0, 7.0]
    assert reader.read("master", "w", 2, 2).numel() == 0
    modes = {path.stat().st_mode & 0o777 for path in reader.path.iterdir()}
    assert len(modes) == 1, "as the user's umask says"
    assert not list(folder.rglob("*.part"))


def test_copies_stand_in_one_piece_of_memory_that_stays(folder):
    saver = Saver(folder, keep_last=2, keep_every=0)
    pieces = [
        Piece("master.a", torch.randn(3)),
        Piece("count.a", torch.arange(5)),
        Piece("exp_avg.a", torch.randn(7).bfloat16()),
        Piece("master.b", torch.randn(1)),
    ]
    copies = saver._copied(pieces)
    place = saver._buffer.data_ptr()
    assert all(torch.equal(copies[key], values) for key, values in pieces)
    assert {copies[key].untyped_storage().data_ptr() for key, _ in pieces} == {place}
    changed = [Piece(key, values + 1) for key, values in pieces]
    again = saver._copied(changed)
    assert saver._buffer.data_ptr() == place
    assert all(torch.equal(again[key], values) for key, values in changed)
    assert saver._copied([]) == {}


def test_a_run_folder_that_was_moved_is_not_made_again(folder):
    saver = Saver(folder / "run", keep_last=1, keep_every=0)
    layout = EachTensor({"a": 5}, 1).to_dict()
    manifest = {"update": 1, "samples": 4, "zero_stage": 3, "layout": layout, "world_size": 1}
    saver.begin(manifest, [Piece("master.a", torch.ones(5))])
    saver.wait()
    assert saver.failed
    saver.close()
    assert not (folder / "run").exists()


def test_state_on_a_disk_is_written_from_where_it_lies_and_is_the_same_to_the_byte(folder):
    state = torch.from_file(str(folder / "state"), shared=True, size=3000).normal_()
    pieces = [
        Piece("master.b", state[1000:1999]),
        Piece("master.a", state[:1000]),
        Piece("exp_avg.b", state[2000:2999]),
        Piece("count.a", torch.arange(5)),
    ]
    layout = EachTensor({"a": 1000, "b": 999}, 1).to_dict()
    manifest = {"update": 1, "samples": 4, "zero_stage": 3, "layout": layout, "world_size": 1}
    contents, buffers = [], []
    for copies in (True, False):
        (folder / str(copies)).mkdir()
        saver = Saver(folder / str(copies), keep_last=1, keep_every=0, copies=copies)
        saver.begin(manifest, pieces)
        saver.wait()
        assert saver.finish(failed_anywhere=saver.failed)
        saver.close()
        (stored,) = store.complete(saver.folder)
        contents.append({path.name: path.read_bytes() for path in stored.path.iterdir()})
        buffers.append(saver._buffer.nbytes)
    assert contents[0] == contents[1]
    assert buffers[0] > sum(values.nbytes for _, values in pieces)
    assert buffers[1] == 0


def test_a_write_that_fails_leaves_the_old_ones(save, folder, updates_left, monkeypatch):
    save(1)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fd_large.checkpoint.tensor_file.write", full)
    assert not save(2)
    assert updates_left() == [1]
    assert not list(folder.rglob("*.part"))


def test_nothing_is_complete_without_every_ranks_files(save, folder):
    assert not save(2, world_size=2), "rank 1 wrote elsewhere"
    assert store.complete(folder) == []


def test_an_error_at_any_operation_of_a_save_loses_nothing(save, folder, updates_left):
    """Errors that pass are got over; of others the save is lost and the ones before it stay."""
    save(1)

    def sound():
        store.sweep(folder)
        reader, complaints = newest_sound(folder)
        assert complaints == []
        assert reader.read("master", "w", 0, 5).tolist() == [7.0] * 5
        assert updates_left()[0] == 1
        left = {path.name for path in store.checkpoints_of(folder).iterdir()}
        assert left == {store.name_of(update) for update in updates_left()}
        return reader.manifest["update"]

    def again():
        """A run that went back arrives at the same step once more."""
        return save(2) and save(2)

    with watching(folder) as calm:
        assert again()
    assert len(calm.operations) > 30
    for number in range(len(calm.operations)):
        for error, after, lasts in (
            (errno.EIO, False, False),
            (errno.ESTALE, True, False),
            (errno.EIO, False, True),
            (errno.ENOSPC, False, False),
        ):

            def fails(operation, number=number, error=error, after=after, lasts=lasts):
                at = operation.number == number and operation.done == after
                return error if at or (lasts and operation.number > number) else None

            with watching(folder, fails):
                written = again()
            where = (calm.operations[number], error, after, lasts)
            if error != errno.ENOSPC and not lasts:
                assert written, where
            assert sound() == 2 or not written, where
