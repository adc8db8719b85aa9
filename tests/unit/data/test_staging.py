"""The copy of a data set on a local disk: the same samples, whole, made once, mended."""

from __future__ import annotations

import errno
import fcntl
import os
import pickle
import shutil
import tarfile
import threading
from pathlib import Path

import pytest
import torch
from small_disk import mounted
from waiting import until

from fd_large.data import staging
from fd_large.data.loader import ViewBatches, build_loader
from fd_large.data.sampler import Portion
from fd_large.data.source import ImageSource, open_images
from fd_large.data.staging import stage
from fd_large.data.views import ViewSettings
from fd_large.errors import DataError


@pytest.fixture
def root(tmp_path: Path, picture_folder: Path) -> Path:
    """The data set in two shards of a folder."""
    folder = tmp_path / "shards"
    folder.mkdir()
    files = sorted(picture_folder.rglob("*.*"))
    for number in range(2):
        with tarfile.open(folder / f"train-{number}.tar", "w") as archive:
            for path in files[number::2]:
                archive.add(path, path.relative_to(picture_folder))
    return folder


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / "local" / "copies"


@pytest.fixture
def small_disk(tmp_path: Path) -> Path:
    """A file system of one megabyte."""
    yield from mounted(tmp_path, "1m")


def copies(local: Path) -> list[Path]:
    return sorted(local.glob("*.staged"))


def contents(source: ImageSource) -> list[bytes]:
    return [bytes(source.read(index)) for index in range(len(source))]


def stamps(local: Path) -> list[tuple[int, int]]:
    return [(path.stat().st_ino, path.stat().st_ctime_ns) for path in copies(local)]


def epoch(source: ImageSource) -> tuple[torch.Tensor, list[int], int]:
    loader = build_loader(
        ViewBatches(source, ViewSettings(32, 0.2), 3, 1),
        len(source),
        Portion(1, 0, 5, 0, 1),
        global_batch_size=5,
        workers=0,
    )
    batches = list(loader)
    images = torch.cat([batch.images for batch in batches])
    indices = torch.cat([batch.indices for batch in batches]).tolist()
    return images, indices, sum(len(batch.bad) for batch in batches)


@pytest.mark.parametrize("form", ["shards", "folder"])
def test_a_staged_data_set_is_the_same_and_its_origin_is_not_read(
    form, root, local, picture_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(staging, "IMAGES_PER_FILE", 10)  # 26 images: three files
    where = tmp_path / "origin"
    shutil.copytree(root if form == "shards" else picture_folder, where)
    before = open_images(str(where))
    wanted, views = contents(before), epoch(before)
    after = pickle.loads(pickle.dumps(stage(before, str(local))))
    shutil.rmtree(where)
    assert after.fingerprint == before.fingerprint
    assert contents(after) == wanted
    images, indices, bad = epoch(after)
    assert torch.equal(images, views[0])
    assert (indices, bad) == (views[1], 0)
    assert after[0].startswith(str(local))
    assert len(copies(local)) == (2 if form == "shards" else 3)
    # All nodes have one time, so that they share a kept index of copies at one path.
    times = before.sizes_and_times if form == "shards" else [[0, before.modified]] * 3
    found = sorted(path.stat().st_mtime_ns for path in copies(local))
    assert found == sorted(modified for _, modified in times)


@pytest.mark.parametrize("form", ["shards", "folder"])
def test_a_second_start_takes_what_is_there(form, root, local, picture_folder, monkeypatch):
    where = str(root if form == "shards" else picture_folder)
    stage(open_images(where), str(local))
    first = stamps(local)
    # Nothing is read: neither the origin's contents nor, for the checksum, the copy's.
    monkeypatch.setattr(staging, "_checksum", None)
    again = stage(open_images(where), str(local))
    assert stamps(local) == first
    assert again.fingerprint == open_images(where).fingerprint


def test_a_copy_is_no_picture_and_no_shard(root):
    """Who stages into the data set's own folder still has the same data set."""
    before = open_images(str(root))
    stage(before, str(root))
    stage(before, str(root / "inside"))
    for pattern in ("", "/*.tar", "/train-*"):
        after = open_images(f"{root}{pattern}")
        assert after.fingerprint == before.fingerprint
        assert len(after) == len(before)


def flipped(path: Path) -> None:
    """One byte, as a bad disk would: size and times as before, but for the one nobody can set."""
    status = path.stat()
    with path.open("r+b") as file:
        file.seek(700)
        byte = file.read(1)[0]
        file.seek(700)
        file.write(bytes([byte ^ 1]))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))


def cut(path: Path) -> None:
    os.truncate(path, 1000)


def without_note(path: Path) -> None:
    path.with_name(path.name + ".json").unlink()


def torn_note(path: Path) -> None:
    os.truncate(path.with_name(path.name + ".json"), 20)


@pytest.mark.parametrize("damage", [flipped, cut, without_note, torn_note, Path.unlink])
def test_a_damaged_copy_is_mended_and_the_sound_one_stays(damage, root, local, caplog):
    source = open_images(str(root))
    wanted = contents(source)
    stage(source, str(local))
    victim, other = copies(local)
    good, untouched = victim.read_bytes(), other.stat().st_ino
    damage(victim)
    assert contents(stage(source, str(local))) == wanted
    assert victim.read_bytes() == good
    assert other.stat().st_ino == untouched
    if damage in (flipped, cut):
        assert f"{victim}: DAMAGED, copied again" in caplog.text


def test_a_copy_that_was_only_touched_is_read_once_and_kept(root, local):
    source = open_images(str(root))
    stage(source, str(local))
    first = stamps(local)
    os.chmod(copies(local)[0], 0o600)  # another ctime
    stage(source, str(local))
    inodes = [inode for inode, _ in first]
    assert [inode for inode, _ in stamps(local)] == inodes


def test_another_content_of_the_shard_is_another_copy(root, local):
    stage(open_images(str(root)), str(local))
    shutil.copy(root / "train-1.tar", root / "train-0.tar")
    source = open_images(str(root))
    assert contents(stage(source, str(local))) == contents(source)
    assert len(copies(local)) == 2


def test_a_picture_renamed_into_a_folder_is_copied_again(local, picture_folder, tmp_path):
    where = tmp_path / "pictures"
    shutil.copytree(picture_folder, where)
    stage(open_images(str(where)), str(local))
    shutil.copy(where / "a" / "0.jpg", where / "a" / "new")
    os.replace(where / "a" / "new", where / "a" / "6.jpg")
    source = open_images(str(where))
    assert contents(stage(source, str(local))) == contents(source)


def test_a_bad_picture_is_as_bad_in_the_copy(local, picture_folder, tmp_path, caplog):
    where = tmp_path / "pictures"
    shutil.copytree(picture_folder, where)
    (where / "a" / "0.jpg").unlink()
    (where / "a" / "0.jpg").symlink_to("nowhere")
    source = open_images(str(where))
    staged = stage(source, str(local))
    assert staged.fingerprint == source.fingerprint
    for before, after in zip(epoch(source), epoch(staged), strict=True):
        assert torch.equal(before, after) if torch.is_tensor(before) else before == after
    assert epoch(staged)[2] > 0
    assert "0.jpg: cannot be read" in caplog.text


def test_a_file_system_that_fails_for_now_stops_the_copy(local, picture_folder, monkeypatch):
    source = open_images(str(picture_folder))

    def fails(index: int) -> bytes:
        raise DataError("x") from OSError(errno.ESTALE, "Stale file handle")

    monkeypatch.setattr(source, "read", fails)
    with pytest.raises(DataError, match=r"data\.stage_to: .*Stale file handle"):
        stage(source, str(local))
    assert os.listdir(local) == [".lock"]


def test_too_little_room_is_told_before_anything_is_written(root, small_disk):
    with pytest.raises(DataError, match=r"data\.stage_to: .*got 0\.00 GB free, expected 0\.07"):
        stage(open_images(str(root)), str(small_disk))
    assert os.listdir(small_disk) == [".lock"]


def test_a_disk_that_fills_up_meanwhile_leaves_nothing_half_done(root, small_disk, monkeypatch):
    big = root / "train-2.tar"
    with tarfile.open(big, "w") as archive:
        info = tarfile.TarInfo("z.jpg")
        info.size = 2 << 20
        with open("/dev/zero", "rb") as zeros:
            archive.addfile(info, zeros)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 1 << 40))
    with pytest.raises(DataError, match=r"data\.stage_to: .*No space left on device"):
        stage(open_images(str(root)), str(small_disk))
    names = os.listdir(small_disk)
    assert not [name for name in names if name.startswith(".partial-") or "train-2" in name]


def test_a_folder_that_cannot_be_made_is_told(root, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"data\.stage_to: .*Not a directory"):
        stage(open_images(str(root)), str(tmp_path / "file" / "local"))


def test_a_disk_that_gives_back_other_bytes_is_told(root, local, monkeypatch):
    def corrupt(descriptor: int, *_: int) -> None:
        os.pwrite(descriptor, b"\xff", 10)

    monkeypatch.setattr(os, "posix_fadvise", corrupt)
    with pytest.raises(DataError, match=r"data\.stage_to: .*another checksum"):
        stage(open_images(str(root)), str(local))
    assert copies(local) == []


def test_a_shard_that_changes_under_the_copy_is_told(root, local):
    source = open_images(str(root))
    with (root / "train-0.tar").open("ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match=r"data\.stage_to: .*train-0\.tar.*changed"):
        stage(source, str(local))


def test_what_a_kill_left_is_swept_and_another_run_is_waited_for(root, local, caplog):
    local.mkdir(parents=True)
    (local / ".partial-xyz").write_text("half")
    holder = (local / ".lock").open("ab")
    fcntl.flock(holder, fcntl.LOCK_EX)
    caplog.set_level("INFO")

    too_early = []

    def release() -> None:
        try:
            until(lambda: "waiting" in caplog.text, 20, "the second run says that it waits")
        finally:
            too_early.extend(copies(local))
            holder.close()

    thread = threading.Thread(target=release)
    thread.start()
    stage(open_images(str(root)), str(local))
    thread.join()
    assert not too_early
    assert "another run copies" in caplog.text
    assert len(copies(local)) == 2
    assert not list(local.glob(".partial-*"))


def test_samples_that_cannot_be_copied_are_refused_and_not_forgotten():
    with pytest.raises(DataError, match=r"data\.stage_to: .*'/disk'"):
        stage([], "/disk")
    assert stage([], "") == []


def test_what_needs_no_copy_is_left_alone(root, local):
    source = open_images(str(root))
    assert stage(source, "") is source
    photographs = open_images("builtin:photographs-held-out")
    assert stage(photographs, str(local)) is photographs
    assert not local.exists()
