"""The newest sound checkpoint, past damaged ones and past errors that pass."""

import pytest

from fd_large.checkpoint import read, store
from fd_large.checkpoint.read import newest_sound


@pytest.fixture(autouse=True)
def at_once(monkeypatch):
    monkeypatch.setattr(read, "SECONDS_BETWEEN_TRIES", 0.0)


def test_a_damaged_one_is_passed_over_named_and_kept(folder, stored, updates_left):
    newer = stored(1, 2)
    (newer / store.file_of(0)).write_bytes(b"torn")
    reader, complaints = newest_sound(folder, lambda layout: {0})
    assert reader.manifest["update"] == 1
    assert reader.read("master", "w", 0, 5).tolist() == [1.0] * 5
    assert str(newer) in complaints[0]
    assert newer.with_name("damaged_" + newer.name).is_dir()
    assert updates_left() == [1]


def test_a_checkpoint_without_manifest_is_a_complaint_too(folder, stored):
    (stored(1, 2) / "manifest.json").write_text("{")
    reader, complaints = newest_sound(folder, lambda layout: {0})
    assert reader.manifest["update"] == 1
    assert "manifest.json" in complaints[0]


def test_at_most_so_many_steps(folder, stored, updates_left):
    stored(1, 2, 3)
    reader, _ = newest_sound(folder, lambda layout: {0}, at_most=2)
    assert reader.manifest["update"] == 2
    assert newest_sound(folder, lambda layout: {0}, at_most=0) == (None, [])


def test_an_error_that_passes_is_not_believed(folder, stored, monkeypatch):
    stored(1, 2)
    answers = iter(["rank_00000.safetensors cannot be read: Input/output error", None, None])
    monkeypatch.setattr(store, "damage", lambda path, rank: next(answers))
    reader, complaints = newest_sound(folder, lambda layout: {0})
    assert (reader.manifest["update"], complaints) == (2, [])
