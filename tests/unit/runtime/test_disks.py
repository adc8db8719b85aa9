"""What a disk is, how fast, and whether it can hold a run's state."""

from __future__ import annotations

import errno
from types import SimpleNamespace

import psutil
import pytest

from fd_large.errors import ConfigError
from fd_large.runtime import disks


@pytest.fixture
def mounts(monkeypatch):
    """Sets what is mounted where, in the order in which it was mounted."""

    def mount(*points):
        found = [SimpleNamespace(mountpoint=str(at), fstype=kind) for at, kind in points]
        monkeypatch.setattr(psutil, "disk_partitions", lambda all: found if all else [])

    return mount


def test_the_deepest_mount_counts_and_of_two_on_one_point_the_last(tmp_path, mounts):
    inside = tmp_path / "data" / "x"
    mounts(("/", "ext4"), (tmp_path / "data", "xfs"), (tmp_path / "dat", "nfs"), (tmp_path, "ceph"))
    assert [disks.file_system(path) for path in (inside, tmp_path)] == ["xfs", "ceph"]
    mounts((tmp_path, "autofs"), ("/", "ext4"), (tmp_path, "lustre"))
    assert disks.file_system(inside) == "lustre"
    mounts(("/elsewhere", "ext4"))
    assert disks.file_system(inside) == "?"
    (tmp_path / "link").symlink_to("/elsewhere")
    assert disks.file_system(tmp_path / "link" / "x") == "ext4"


@pytest.mark.parametrize(
    ("seconds_a_block", "most_bytes", "written"), [(0.25, 1 << 40, 4), (0.25, 20 << 20, 3)]
)
def test_the_speed_is_what_was_written_by_the_time_it_took(
    seconds_a_block, most_bytes, written, tmp_path, monkeypatch
):
    """On a disk that needs a quarter of a second for 8 MiB; until 1 s are over, or enough is."""
    clock = [0.0]

    def flushed(_):
        clock[0] += seconds_a_block

    monkeypatch.setattr(disks.os, "fsync", flushed)
    monkeypatch.setattr(disks.time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(disks, "_WRITE_BYTES", most_bytes)
    monkeypatch.setattr(disks, "_WRITE_SECONDS", 1.0)
    assert disks.write_speed(tmp_path) == (8 << 20) / seconds_a_block
    assert clock == [written * seconds_a_block]
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_can_hold_the_state(tmp_path, mounts, monkeypatch):
    mounts(("/", "ext4"))
    monkeypatch.setattr(disks.shutil, "disk_usage", lambda _: SimpleNamespace(free=5 * 10**9))
    assert disks.unfit_for_state(str(tmp_path), 5 * 10**9) is None
    disks.check_state_folder(str(tmp_path), 5 * 10**9)
    got, expected = disks.unfit_for_state(str(tmp_path), 5 * 10**9 + 10**7)
    assert ("5.00 GB" in got, "5.01 GB" in expected) == (True, True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("kind", "got"), [("tmpfs", "memory"), ("nfs4", "network")])
def test_a_folder_that_is_no_disk_cannot(kind, got, tmp_path, mounts):
    mounts(("/", kind))
    assert got in disks.unfit_for_state(str(tmp_path), 0)[0]
    with pytest.raises(ConfigError, match=rf"engine\.nvme_path: {tmp_path} .*\({kind}\)"):
        disks.check_state_folder(str(tmp_path), 0)


def test_neither_can_a_file_nor_what_is_not_there(tmp_path):
    (tmp_path / "file").touch()
    for name, got in (("file", "a file"), ("none", "no such folder")):
        assert disks.unfit_for_state(str(tmp_path / name), 0)[0].startswith(got)


def test_what_the_system_refuses_is_said_with_its_size(tmp_path, mounts, monkeypatch):
    mounts(("/", "ext4"))

    def full(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(disks.os, "posix_fallocate", full)
    with pytest.raises(ConfigError, match=r"engine\.nvme_path.*quota"):
        disks.unfit_for_state(str(tmp_path), 0)
    with pytest.raises(ConfigError, match=r"quota.* 2\.50 GB"), disks.refused("x", 2_500_000_000):
        full()
