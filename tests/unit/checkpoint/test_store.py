"""The folder of checkpoints: complete, damaged, pruned, half written."""

import errno
import json
import os

import pytest
import torch
from faults import watching
from stored_run import store_tensors

from fd_large import files
from fd_large.checkpoint import store
from fd_large.checkpoint.lease import OWNER, Lease
from fd_large.errors import CheckpointError, StorageError


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(files, "PAUSES", (0.0, 0.0))


def test_the_last_and_every_nth_stay(folder, stored, updates_left):
    stored(*range(1, 8))
    removed = store.prune(folder, keep_last=2, keep_every=3)
    assert [path.name for path in removed] == [store.name_of(u) for u in (1, 2, 4, 5)]
    assert updates_left() == [3, 6, 7]


def test_the_best_stays_and_is_read_by_its_name(folder, stored, updates_left, lease):
    stored(*range(1, 6))
    assert store.best_of(folder) is None
    assert not store.set_best(folder, 9, lease), "there is no such checkpoint"
    assert store.set_best(folder, 1, lease)
    assert store.set_best(folder, 2, lease)
    store.prune(folder, keep_last=1, keep_every=0)
    assert updates_left() == [2, 5]
    best = store.checkpoints_of(folder) / "best"
    assert store.manifest_of(best) == store.manifest_of(best.with_name(store.name_of(2)))
    assert store.best_of(folder) == best.resolve()
    store.sweep(folder)
    store.set_best(folder, 5)
    store.prune(folder, keep_last=1, keep_every=0)
    assert updates_left() == [5]


def test_a_best_whose_checkpoint_is_gone_keeps_nothing(folder, stored, updates_left):
    path = stored(1, 2)
    store.set_best(folder, 2)
    store.remove(path)
    assert store.best_of(folder) is None
    assert store.prune(folder, keep_last=1, keep_every=0) == []
    assert updates_left() == [1]


def test_who_lost_the_folder_names_no_best(folder, stored, lease):
    stored(1)
    usurp(folder)
    with pytest.raises(OSError, match="new owner"):
        store.set_best(folder, 1, lease)


def _shorten(path):
    path.write_bytes(path.read_bytes()[:-8])


def _flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize(
    ("harm", "file", "said"),
    [
        (_flip, store.file_of(1), "checksum"),
        (_shorten, store.file_of(1), "bytes"),
        (lambda path: path.unlink(), store.file_of(1), "missing"),
        (lambda path: path.unlink(), store.receipt_of(1), store.receipt_of(1)),
        (_shorten, store.receipt_of(1), store.receipt_of(1)),
    ],
)
def test_damage_is_found_and_named(harm, file, said, folder, stored):
    path = stored(2, ranks=2)
    assert store.damage(path, 1) is None
    harm(path / file)
    assert said in store.damage(path, 1)
    (item,) = store.complete(folder)
    assert store.verify(item) == [store.damage(path, 1)]


def test_a_damaged_header_is_no_checksum_of_none(tmp_path):
    path = store_tensors(tmp_path, {"w": torch.zeros(9)}, receipts_of_kinds=True)
    with (path / store.file_of(0)).open("r+b") as file:
        file.seek(8)
        file.write(b"[[")
    said = f"{store.file_of(0)} is damaged: it cannot be read as a file of tensors"
    assert store.damage(path, 0, {"master"}) == said
    assert "checksum" in store.damage(path, 0)


@pytest.mark.parametrize("kinds", [None, {"master"}, {"ema"}])
@pytest.mark.parametrize("of_kinds", [True, False])
def test_what_is_not_asked_for_is_not_read(tmp_path, kinds, of_kinds):
    tensors = {"w": torch.zeros(50_000)}
    path = store_tensors(tmp_path, tensors, ema=tensors, receipts_of_kinds=of_kinds)
    whole = (path / store.file_of(0)).stat().st_size
    with watching(path) as watched:
        assert store.damage(path, 0, kinds) is None
    parts = kinds is not None and of_kinds
    assert (watched.bytes_read < 0.6 * whole) == parts
    # The average comes first in the file.
    with (path / store.file_of(0)).open("r+b") as file:
        file.seek(whole // 4)
        file.write(b"flipped")
    assert (store.damage(path, 0, kinds) is None) == (parts and kinds == {"master"})
    content = bytearray((path / store.file_of(0)).read_bytes())
    content[20] ^= 1
    (path / store.file_of(0)).write_bytes(content)
    assert store.damage(path, 0, kinds)


@pytest.mark.parametrize(
    ("error", "refusal"),
    [(errno.EIO, StorageError), (errno.ESTALE, StorageError), (errno.EACCES, CheckpointError)],
)
def test_what_cannot_be_read_is_not_damaged(folder, stored, error, refusal):
    path = stored(2)
    with watching(path, lambda operation: error), pytest.raises(refusal):
        store.damage(path, 0)
    with watching(path, lambda operation: error), pytest.raises(refusal):
        store.complete(folder)


class Killed(BaseException):
    """The process is no more."""


def test_a_kill_at_any_operation_of_a_save_loses_nothing(tmp_path, monkeypatch):
    """The first save of a step, and one that replaces the same step of a run that went back."""

    def save(folder, value):
        store_tensors(folder, {"w": torch.full((5,), value)}, update=2, ranks=2)

    def values(folder):
        (item,) = [item for item in store.complete(folder) if item.update == 2] or [None]
        if item is None:
            return None
        assert store.verify(item) == []
        content = (item.path / store.file_of(0)).read_bytes()
        return torch.frombuffer(bytearray(content[-12:]), dtype=torch.float32).tolist()

    number, found, dead = 0, set(), True
    while dead:
        dead = False
        for replaced in (False, True):
            folder = tmp_path / f"{number}_{replaced}"
            with watching(folder):
                store_tensors(folder, {"w": torch.ones(5)}, update=1)
                if replaced:
                    save(folder, 2.0)

            def fails(operation, number=number):
                if operation.number >= number:
                    raise Killed

            try:
                with watching(folder, fails):
                    save(folder, 3.0)
            except Killed:
                dead = True
            store.sweep(folder)
            assert store.complete(folder)[0].update == 1
            left = values(folder)
            assert left in ([[2.0] * 3, [3.0] * 3] if replaced else [None, [3.0] * 3])
            found.add((replaced, str(left)))
            names = {p.suffix for p in store.checkpoints_of(folder).iterdir()}
            assert names == {""}, "nothing half done is left"
        number += 1
    assert len(found) == 4
    assert number > 15


@pytest.mark.parametrize("digits", [('"update": 2', '"update": 3'), ("}", "")])
def test_a_manifest_with_a_flipped_digit_or_an_end_missing_is_none(digits, stored, updates_left):
    path = stored(1, 2) / "manifest.json"
    path.write_text(path.read_text().replace(*digits))
    assert updates_left() == [1]


def test_an_entry_of_a_manifest_changes_and_the_rest_stays(folder, stored):
    path = stored(1, 2)
    before = store.manifest_of(path)
    store.amend(path, {"evaluated": True})
    assert store.manifest_of(path) == before | {"evaluated": True}
    (path / "manifest.json").write_text("{")
    with pytest.raises(OSError, match="damaged"):
        store.amend(path, {"evaluated": True})


def test_half_written_folders_are_invisible_and_swept(folder, stored, updates_left):
    whole = stored(1, 2)
    torn = whole.with_name(store.name_of(3) + store.PART)
    torn.mkdir()
    (torn / "manifest.json").write_text(json.dumps({"update": 3}))
    # Killed while step 2, written again, took the place of the old one.
    whole.rename(whole.with_name(whole.name + store.OLD))
    assert updates_left() == [1]
    store.sweep(folder)
    assert updates_left() == [1, 2]
    assert len(list(store.checkpoints_of(folder).iterdir())) == 2


def usurp(folder):
    """Another start takes the folder over."""
    (folder / OWNER).write_text('{"start": "other", "host": "n7"}')


def test_who_lost_the_folder_commits_and_removes_nothing(folder, stored, updates_left, lease):
    stored(1, 2, 3)
    part = store.part_of(folder, 4, lease)
    store.checkpoints_of(folder).joinpath(store.name_of(3)).rename(part)
    manifest = {**store.complete(folder)[0].manifest, "update": 4}
    usurp(folder)
    with pytest.raises(OSError, match="new owner"):
        store.commit(part, manifest, lease)
    assert store.prune(folder, keep_last=1, keep_every=0, lease=lease) == []
    assert updates_left() == [1, 2]


def test_a_commit_that_asked_before_it_lost_the_folder_comes_too_late(
    folder, stored, updates_left, lease, monkeypatch
):
    """It asks, sleeps while the new owner sweeps, and renames."""
    stored(1, 2)
    part = store.part_of(folder, 2, lease)
    store.checkpoints_of(folder).joinpath(store.name_of(2)).rename(part)
    manifest = {**store.complete(folder)[0].manifest, "update": 2}

    def ask():
        usurp(folder)
        store.sweep(folder)
        return True

    monkeypatch.setattr(lease, "owned", ask)
    with pytest.raises(FileNotFoundError):
        store.commit(part, manifest, lease)
    assert updates_left() == [1]


def test_two_starts_write_the_same_step_to_folders_of_their_own(folder, stored, lease):
    other = Lease(folder, "other")
    assert store.part_of(folder, 4, lease) != store.part_of(folder, 4, other)
    path = stored(4)
    manifest, part = store.manifest_of(path), store.part_of(folder, 4, lease)
    path.rename(part)
    assert store.commit(part, manifest, lease) == path
    assert store.manifest_of(path)["start"] == lease.start


@pytest.mark.parametrize("file", ["manifest.json", "rank_00000.json", "rank_00000.safetensors"])
def test_a_pipe_in_a_checkpoint_is_damage_and_not_waited_for(file, folder, stored, updates_left):
    stored(2, ranks=1)
    stored(4, ranks=1)
    path = store.complete(folder)[-1].path / file
    path.unlink()
    os.mkfifo(path)
    if file == "manifest.json":
        assert updates_left() == [2]
    else:
        assert file.partition(".")[0] in store.verify(store.complete(folder)[-1])[0]
