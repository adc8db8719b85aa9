"""The folder of checkpoints: complete, damaged, pruned, half written."""

import json

import pytest

from fd_large.checkpoint import store
from fd_large.checkpoint.lease import OWNER, Lease


def test_the_last_and_every_nth_stay(folder, stored, updates_left):
    stored(*range(1, 8))
    removed = store.prune(folder, keep_last=2, keep_every=3)
    assert [path.name for path in removed] == [store.name_of(u) for u in (1, 2, 4, 5)]
    assert updates_left() == [3, 6, 7]


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
    with pytest.raises(OSError, match="missing or damaged"):
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
