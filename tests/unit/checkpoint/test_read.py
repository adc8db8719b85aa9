"""The newest sound checkpoint, past damaged ones and past errors that pass."""

import errno

import pytest
import torch
from faults import watching
from stored_run import store_tensors

from fd_large import files
from fd_large.checkpoint import read, store
from fd_large.checkpoint.read import Reader, newest_sound
from fd_large.errors import CheckpointError, StorageError


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(read, "SECONDS_BETWEEN_TRIES", 0.0)
    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0))


@pytest.fixture
def names(folder):
    return lambda: sorted(path.name for path in store.checkpoints_of(folder).iterdir())


def test_a_damaged_one_is_passed_over_named_and_kept(folder, stored, updates_left):
    newer = stored(1, 2)
    (newer / store.file_of(0)).write_bytes(b"torn")
    reader, complaints = newest_sound(folder)
    assert reader.manifest["update"] == 1
    assert reader.read("master", "w", 0, 5).tolist() == [1.0] * 5
    assert str(newer) in complaints[0]
    assert newer.with_name("damaged_" + newer.name).is_dir()
    assert updates_left() == [1]


def test_a_checkpoint_without_manifest_is_a_complaint_too(folder, stored):
    (stored(1, 2) / "manifest.json").write_text("{")
    reader, complaints = newest_sound(folder)
    assert reader.manifest["update"] == 1
    assert "manifest.json" in complaints[0]


def test_at_most_so_many_steps(folder, stored, updates_left):
    stored(1, 2, 3)
    reader, _ = newest_sound(folder, at_most=2)
    assert reader.manifest["update"] == 2
    assert newest_sound(folder, at_most=0) == (None, [])


def test_a_file_that_appears_late_is_not_missing(folder, stored, monkeypatch):
    stored(1, 2)
    answers = iter(["rank_00000.safetensors is missing", None])
    monkeypatch.setattr(store, "damage", lambda path, rank, kinds: next(answers, None))
    reader, complaints = newest_sound(folder)
    assert (reader.manifest["update"], complaints) == (2, [])


def test_what_rank_0_reads_as_it_should_be_is_not_set_aside(folder, stored, names, monkeypatch):
    stored(1, 2)
    before, answers = names(), iter(["rank_00000.safetensors has checksum 0, expected 1", None])
    monkeypatch.setattr(read, "damage", lambda path, rank: next(answers))
    with pytest.raises(StorageError, match=r"on rank 0") as caught:
        newest_sound(folder)
    assert caught.value.exit_code == 75
    assert names() == before


def test_a_file_that_goes_while_it_is_read_is_told_from_one_that_cannot_be_read(folder, stored):
    path = stored(1) / store.file_of(0)
    one = store.Stored(path.parent, store.manifest_of(path.parent))
    path.write_bytes(b"{" * 100)
    with pytest.raises(CheckpointError, match=path.name):
        Reader(one).read("master", "w", 0, 5)
    path.unlink()
    with pytest.raises(FileNotFoundError):
        Reader(one).read("master", "w", 0, 5)


def _resume(folder):
    reader, complaints = newest_sound(folder)
    return reader.manifest["update"], complaints, reader.read("master", "w", 0, 5).tolist()


def test_an_error_at_any_operation_of_a_resume_throws_nothing_out(folder, stored, names):
    stored(1, 2, ranks=2)
    before = names()
    with watching(folder) as calm:
        assert _resume(folder) == (2, [], [2.0] * 5)
    assert len(calm.operations) > 20
    for number in range(len(calm.operations)):
        for error in (errno.EIO, errno.ESTALE, errno.ETIMEDOUT):
            for after in (False, True):

                def once(operation, number=number, error=error, after=after):
                    return error if (operation.number, operation.done) == (number, after) else None

                with watching(folder, once):
                    assert _resume(folder) == (2, [], [2.0] * 5), calm.operations[number]
        for error, refusal in ((errno.EIO, StorageError), (errno.EACCES, CheckpointError)):

            def from_then_on(operation, number=number, error=error):
                return error if operation.number >= number else None

            with watching(folder, from_then_on), pytest.raises(refusal):
                _resume(folder)
            assert names() == before, calm.operations[number]


@pytest.mark.parametrize("stage", [1, 3])
@pytest.mark.parametrize("ranks", [8, 64, 200])
def test_each_file_is_opened_once_whatever_their_number(tmp_path, ranks, stage):
    tensors = {f"layer.{number}.weight": torch.randn(3200) for number in range(12)}
    path = store_tensors(tmp_path, tensors, ranks=ranks, stage=stage)
    reader = Reader(store.Stored(path, store.manifest_of(path)))
    with watching(path) as watched:
        for name, tensor in tensors.items():
            assert torch.equal(reader.read("master", name, 0, 3200), tensor)
    assert watched.counts()["open"] == ranks
    elements = 4 * sum(tensor.numel() for tensor in tensors.values())
    headers = sum(8 + int.from_bytes(f.read_bytes()[:8], "little") for f in path.glob("*.safe*"))
    assert watched.bytes_read == elements + headers + 8 * ranks


def test_more_files_than_descriptors_are_read_all_the_same(tmp_path, monkeypatch):
    tensors = {"a": torch.randn(40), "b": torch.randn(40)}
    path = store_tensors(tmp_path, tensors, ranks=20)
    reader = Reader(store.Stored(path, store.manifest_of(path)))
    reader._most = 3
    for name, tensor in tensors.items():
        assert torch.equal(reader.read("master", name, 0, 40), tensor)
    assert len(reader._files) == 3


def test_a_file_that_was_replaced_is_opened_again(folder, stored):
    path = stored(2)
    reader = Reader(store.Stored(path, store.manifest_of(path)))
    first = []

    def stale(operation):
        """The file that is open goes stale after its first read."""
        if operation.name == "preadv" and not operation.done:
            first.append(operation.number)
        return errno.ESTALE if len(first) == 4 and operation.name == "preadv" else None

    with watching(folder, stale) as watched:
        assert reader.read("master", "w", 0, 5).tolist() == [2.0] * 5
        assert watched.counts()["open"] == 1
        assert reader.read("master", "w", 0, 5).tolist() == [2.0] * 5
    assert watched.counts()["open"] == 2
