"""The folder of checkpoints: complete, damaged, pruned, half written."""

import json

import pytest

from fd_large.checkpoint import store


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
