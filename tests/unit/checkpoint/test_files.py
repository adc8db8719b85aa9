import json

import pytest
import torch

from fd_large.checkpoint import inspection, store
from fd_large.checkpoint.layout import EachTensor
from fd_large.checkpoint.read import newest_sound
from fd_large.checkpoint.write import Piece, Saver
from fd_large.errors import CheckpointError, ConfigError


def _save(folder, update, value, **keep):
    saver = Saver(folder, **{"keep_last": 2, "keep_every": 0, **keep})
    tensor = torch.full((5,), float(value))
    manifest = {
        "update": update,
        "samples": 4 * update,
        "world_size": 1,
        "zero_stage": 3,
        "teacher_hash": "0" * 16,
        "layout": EachTensor({"w": 5}, 1).to_dict(),
    }
    saver.begin(manifest, [Piece("master.w", tensor)])
    tensor.zero_()  # Training goes on: what is written is what was.
    saver.wait()
    assert saver.finish(failed_anywhere=saver.failed)
    saver.close()
    return store.checkpoints_of(folder) / store.name_of(update)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "recipe.json").write_text('{"runtime": {"keep_last": 2, "keep_every": 4}}')
    return tmp_path


def test_what_was_written_is_read_back(folder):
    _save(folder, 3, 7.0)
    reader, complaints = newest_sound(folder, lambda layout: {0})
    assert complaints == []
    assert reader.manifest["update"] == 3
    assert reader.read("master", "w", 1, 4).tolist() == [7.0, 7.0, 7.0]
    assert reader.read("master", "w", 2, 2).numel() == 0
    assert not list(folder.rglob("*.part"))


def test_files_are_readable_as_the_users_mask_says(folder):
    path = _save(folder, 1, 1.0)
    modes = {p.stat().st_mode & 0o777 for p in path.iterdir()}
    assert len(modes) == 1


def test_the_last_and_every_nth_stay(folder):
    for update in range(1, 8):
        _save(folder, update, update, keep_last=2, keep_every=3)
    assert [item.update for item in store.complete(folder)] == [3, 6, 7]


def test_a_damaged_checkpoint_is_passed_over_and_named(folder):
    _save(folder, 1, 1.0)
    newer = _save(folder, 2, 2.0)
    tensors = newer / store.file_of(0)
    content = bytearray(tensors.read_bytes())
    content[-1] ^= 1
    tensors.write_bytes(content)
    reader, complaints = newest_sound(folder, lambda layout: {0})
    assert reader.manifest["update"] == 1
    assert str(newer) in complaints[0]
    assert "checksum" in complaints[0]
    aside = newer.with_name("damaged_" + newer.name)
    assert aside.is_dir(), "kept for a look, and counted no more"
    assert [item.update for item in store.complete(folder)] == [1]
    aside.rename(newer)
    tensors.write_bytes(content[:-8])
    assert "bytes" in store.damage(newer, 0)
    tensors.unlink()
    assert "missing" in store.damage(newer, 0)
    (newer / store.receipt_of(0)).unlink()
    assert store.receipt_of(0) in store.damage(newer, 0)
    manifest = (newer / "manifest.json").read_text()
    (newer / "manifest.json").write_text(manifest.replace('"update": 2', '"update": 3'))
    assert [item.update for item in store.complete(folder)] == [1], "a digit has flipped"
    (newer / "manifest.json").write_text("{")
    assert [item.update for item in store.complete(folder)] == [1]
    _, complaints = newest_sound(folder, lambda layout: {0})
    assert "manifest.json is missing or damaged" in complaints[0]


def test_a_write_that_fails_leaves_the_old_ones(folder, monkeypatch):
    _save(folder, 1, 1.0)

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fd_large.checkpoint.write.save_file", full)
    saver = Saver(folder, keep_last=2, keep_every=0)
    saver.begin({"update": 2}, [Piece("master.w", torch.zeros(5))])
    saver.wait()
    assert saver.failed
    assert not saver.finish(failed_anywhere=True)
    assert [item.update for item in store.complete(folder)] == [1]
    assert not list(folder.rglob("*.part"))


def test_nothing_is_made_current_without_every_ranks_files(folder):
    saver = Saver(folder, keep_last=2, keep_every=0)
    manifest = {"update": 2, "world_size": 2}
    saver.begin(manifest, [Piece("master.w", torch.zeros(5))])
    saver.wait()
    assert not saver.finish(failed_anywhere=saver.failed), "rank 1 wrote elsewhere"
    assert store.complete(folder) == []


def test_a_half_written_folder_is_invisible_and_swept(folder):
    _save(folder, 1, 1.0)
    torn = store.checkpoints_of(folder) / (store.name_of(2) + store.PART)
    torn.mkdir()
    (torn / "manifest.json").write_text(json.dumps({"update": 2}))
    assert [item.update for item in store.complete(folder)] == [1]
    store.sweep(folder)
    assert not torn.exists()


def test_list_verify_and_prune(folder):
    for update in (2, 4, 5, 6):
        _save(folder, update, update, keep_last=9)
    _, found = inspection.stored_of(str(folder))
    assert [row["update"] for row in inspection.rows(found)] == [2, 4, 5, 6]
    assert inspection.verify_all(found) == []
    removed = inspection.prune_run(folder, None)
    assert [path.name for path in removed] == ["step_00000002"]
    inspection.prune_run(folder, 1)
    assert [item.update for item in store.complete(folder)] == [4, 6]
    (store.checkpoints_of(folder) / "step_00000006" / store.file_of(0)).unlink()
    with pytest.raises(ConfigError, match="nothing would stay"):
        inspection.prune_run(folder, 0)
    with pytest.raises(CheckpointError, match="newest is damaged"):
        inspection.prune_run(folder, 1)
    with pytest.raises(ConfigError, match="no run"):
        inspection.stored_of(str(folder / "none"))
