from __future__ import annotations

import multiprocessing
import os
import pickle
import tarfile
from functools import partial

import pytest
from pretended_ranks import World

from fd_large.data import listing
from fd_large.data import shards as shards_module
from fd_large.data.folder import ImageFolder
from fd_large.data.shards import TarShards
from fd_large.data.source import open_images
from fd_large.errors import DataError
from fd_large.ranks import meeting


def test_shards_are_the_data_set_that_their_folder_was(shards, picture_folder):
    folder, source = ImageFolder(picture_folder), open_images(str(shards))
    assert len(source) == len(folder) == 26
    assert source.fingerprint == folder.fingerprint
    assert source.torn == ()
    copy = pickle.loads(pickle.dumps(source))
    for index in range(26):
        assert source.read(index) == copy.read(index) == folder.read(index)
        assert source[index].partition(".tar/")[2] == os.path.relpath(folder[index], folder.root)


def test_the_index_is_kept_until_a_shard_changes(shards, monkeypatch):
    monkeypatch.setattr(listing, "CACHED_FROM", 3)
    fills = []
    fill = TarShards._fill
    monkeypatch.setattr(
        TarShards, "_fill", lambda s, add, **k: fills.append(1) or fill(s, add, **k)
    )
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


@pytest.mark.parametrize("read_before", [False, True], ids=["closed", "open"])
@pytest.mark.parametrize("how", ["written to", "replaced"])
def test_a_shard_that_changed_under_a_run_is_not_read(shards, monkeypatch, read_before, how):
    monkeypatch.setattr(shards_module, "CHECK_SECONDS", 0.0)
    shard = shards / "train-000.tar"
    source = open_images(str(shard))
    if read_before:
        source.read(0)
    if how == "replaced":
        (shards / "other").write_bytes(shard.read_bytes())
        (shards / "other").rename(shard)
    with open(shard, "ab") as file:
        file.write(bytes(512))
    with pytest.raises(DataError, match=r"train-000\.tar/.*changed"):
        source.read(0)


@pytest.fixture
def opened(monkeypatch):
    """The shards that are opened to be read, in order."""
    done = []
    open_ = os.open

    def counted(path, flags, *args, **options):
        if str(path).endswith(".tar"):
            done.append(os.path.basename(path))
        return open_(path, flags, *args, **options)

    monkeypatch.setattr(os, "open", counted)
    return done


def descriptors():
    return len(os.listdir("/proc/self/fd"))


def test_a_shard_is_opened_once_for_many_images(shards, opened):
    source = open_images(str(shards))
    for _ in range(3):
        for index in range(len(source)):
            source.read(index)
    assert sorted(opened) == sorted({*opened})
    assert len(opened) == len(source.paths) == 3
    pickle.loads(pickle.dumps(source)).read(0)
    assert len(opened) == 4  # A process that was not forked opens its own.


def test_the_shard_used_longest_ago_is_closed(shards, opened, monkeypatch):
    monkeypatch.setattr(shards_module, "MOST_OPEN", 2)
    source, before = open_images(str(shards)), descriptors()
    shard_of = [source._listing.number("shard", index) for index in range(len(source))]
    first = [shard_of.index(shard) for shard in range(3)]
    for shard in (0, 1, 0, 2, 0, 1):
        source.read(first[shard])
    names = [os.path.basename(source.paths[shard]) for shard in (0, 1, 2, 1)]
    assert opened == names
    assert descriptors() == before + 2
    del source
    assert descriptors() == before


def test_forked_workers_read_by_their_parents_descriptors(shards):
    source = open_images(str(shards))
    wanted = [bytes(source.read(index)) for index in range(len(source))]
    context = multiprocessing.get_context("fork")
    results = context.Queue()

    def work():
        results.put([bytes(source.read(index)) for _ in range(20) for index in range(len(source))])

    workers = [context.Process(target=work) for _ in range(3)]
    for worker in workers:
        worker.start()
    for _ in workers:
        assert results.get(timeout=60) == wanted * 20
    for worker in workers:
        worker.join(60)


def test_a_descriptor_that_fails_is_opened_anew(shards, opened, monkeypatch):
    source = open_images(str(shards))
    wanted, preadv, failures = source.read(0), os.preadv, iter([OSError(116, "Stale file handle")])

    def fails_once(*arguments):
        for error in failures:
            raise error
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", fails_once)
    assert source.read(0) == wanted
    assert len(opened) == 2


def test_only_rank_0_looks_at_the_shards(tmp_path, shards, monkeypatch, cache):
    monkeypatch.setattr(listing, "CACHED_FROM", 1)
    others = []
    for count in (2, 30):
        root = tmp_path / str(count)
        root.mkdir()
        for number in range(count):
            (root / f"{number:02}.tar").write_bytes((shards / "train-000.tar").read_bytes())
            os.utime(root / f"{number:02}.tar", (1e9, 1e9))
        for pattern in ("", f"/{{00..{count - 1:02}}}.tar", "/*.tar"):
            world = World(monkeypatch, 4, below=(root, cache))
            for _ in range(2):
                open_all = partial(open_images, f"{root}{pattern}")
                found = world.run(partial(meeting.meet, open_all))
                assert len({source.fingerprint for source in found}) == 1
                assert all(len(source.paths) == count for source in found)
                assert world.done[0].total() > count
                others.append((pattern, world.done[1:]))
    half = len(others) // 2
    for (pattern, small), (_, large) in zip(others[:half], others[half:], strict=True):
        assert small == large, pattern


@pytest.mark.parametrize(
    ("name", "num", "told"),
    [
        ("shard_good.tar", 4, None),
        ("shard_mixed.tar", 4, None),  # Two of them are found bad when they are decoded.
        ("shard_cut.tar", 3, "the member at byte 28160 has 3993 of 7986 bytes; the 3 "),
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
