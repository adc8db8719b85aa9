from __future__ import annotations

import os
import pickle
import tarfile

import pytest

from fd_large.data import listing
from fd_large.data.folder import ImageFolder
from fd_large.data.shards import TarShards, expand_braces
from fd_large.data.source import open_images
from fd_large.errors import DataError


def test_shards_are_the_data_set_that_their_folder_was(shards, picture_folder):
    folder, source = ImageFolder(picture_folder), open_images(str(shards))
    assert len(source) == len(folder) == 26
    assert source.fingerprint == folder.fingerprint
    assert source.torn == ()
    copy = pickle.loads(pickle.dumps(source))
    for index in range(26):
        assert source.read(index) == copy.read(index) == folder.read(index)
        assert source[index].partition(".tar/")[2] == os.path.relpath(folder[index], folder.root)


def test_braces_are_written_out():
    assert expand_braces("a-{08..11}.tar") == ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]
    assert expand_braces("{a,b}{2..1}") == ["a2", "a1", "b2", "b1"]
    assert expand_braces("{a}") == ["{a}"]


def test_the_index_is_kept_until_a_shard_changes(shards, monkeypatch):
    monkeypatch.setattr(listing, "CACHED_FROM", 3)
    fills = []
    fill = TarShards._fill
    monkeypatch.setattr(TarShards, "_fill", lambda s, add: fills.append(1) or fill(s, add))
    for shard in shards.iterdir():
        os.utime(shard, (1e9, 1e9))
    for _ in range(2):
        assert len(open_images(str(shards))) == 26
    assert len(fills) == 1
    os.utime(shards / "train-001.tar", (1e9 + 1, 1e9 + 1))
    open_images(str(shards))
    assert len(fills) == 2
    (shards / "train-001.tar").unlink()
    assert len(open_images(str(shards))) == 17
    assert len(fills) == 3


def test_a_shard_that_changed_under_a_run_is_not_read(shards):
    source = open_images(str(shards / "train-000.tar"))
    with open(shards / "train-000.tar", "ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match=r"train-000\.tar/.*a shard that changed"):
        source.read(0)


@pytest.mark.parametrize(
    ("name", "num", "told"),
    [
        ("shard_good.tar", 4, None),
        ("shard_mixed.tar", 4, None),  # Two of them are found bad when they are decoded.
        ("shard_cut.tar", 3, "the member at byte 28160 has 3993 of 7986 bytes; 3 "),
        ("shard_bad_checksum.tar", 2, "the header at byte 18944 is damaged"),
    ],
)
def test_torn_shards_are_told_and_used_as_far_as_they_go(
    data_file, tmp_path, caplog, name, num, told
):
    with tarfile.open(data_file("bad_images.tar")) as archive:
        archive.extract(name, tmp_path, filter="data")
    source = open_images(str(tmp_path / name))
    assert len(source) == num
    assert [told in message for message in source.torn] == [True] * bool(told)
    assert all(message in caplog.text for message in source.torn)
