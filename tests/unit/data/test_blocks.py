from __future__ import annotations

import os
import threading
import time

import numpy as np
import pytest

from fd_large.data import blocks
from fd_large.data.blocks import BlockCache, BlockImages, block_key, keep_blocks_in, the_cache
from fd_large.data.objects import Stored
from fd_large.errors import ConfigError, DataError

made: list[tuple[str, int]] = []


class Texts(BlockImages):
    """Blocks of five texts: '<part>/<place>'."""

    def __init__(self, num_blocks):
        every = np.arange(num_blocks)
        super().__init__(
            [Stored("/x", 1, "1")],
            np.stack([every * 0, every, every * 0 + 5, every * 0 + 1000], axis=1),
            fingerprint="",
            kind="texts",
        )

    def _make(self, stored, part, writer):
        made.append((stored.url, part))
        if part == 2:
            raise DataError("damaged")
        for place in range(5):
            text = f"{part}/{place}".encode() * 50
            writer.file.write(text)
            writer.note(f"n{place}".encode(), writer.file.tell() - len(text), len(text), place)


@pytest.fixture(autouse=True)
def kept(tmp_path, monkeypatch):
    made.clear()
    monkeypatch.setattr(blocks, "_cache", [])
    keep_blocks_in(str(tmp_path / "blocks"), 1)
    return tmp_path / "blocks"


def test_a_block_is_made_once_for_all(kept):
    images = Texts(4)
    assert images.read(8) == b"1/3" * 50
    assert images[8] == "/x/n3"
    assert made == [("/x", 1)]
    again = Texts(4)
    assert again.read(9) == b"1/4" * 50
    assert again._open(1).labels.tolist() == [0, 1, 2, 3, 4]
    assert made == [("/x", 1)]
    assert [path.name for path in kept.glob("*.block")] == [
        f"{block_key(images.files[0], 1)}.block"
    ]
    assert not list(kept.glob(".partial*"))


def test_a_block_that_cannot_be_made_costs_its_images_and_is_tried_once():
    images = Texts(4)
    for _ in range(3):
        with pytest.raises(DataError, match=r"^/x/2/1: .*damaged"):
            images.read(11)
    assert made == [("/x", 2)]
    assert images.read(15) == b"3/0" * 50


def test_threads_that_want_one_block_make_it_once():
    begun = threading.Barrier(4)

    def want():
        images = Texts(4)
        begun.wait()
        assert images.read(0) == b"0/0" * 50

    threads = [threading.Thread(target=want) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert made == [("/x", 0)]


def test_blocks_used_longest_ago_make_room(kept, monkeypatch):
    images = Texts(40)
    images.read(0)
    size = next(kept.glob("*.block")).stat().st_size
    cache = BlockCache(kept, 3 * size)
    monkeypatch.setattr(blocks, "_cache", [cache])
    images = Texts(40)

    def times():
        for number, path in enumerate(sorted(kept.glob("*.block"), key=os.path.getmtime)):
            os.utime(path, (number, number))

    for number in (3, 4, 0, 5):
        images.read(5 * number)  # Block 0 is used again before there is no room.
        times()
        images = Texts(40)
    held = {n for n in range(40) if cache.holds(block_key(images.files[0], n))}
    assert held == {4, 0, 5}
    assert images.read(15) == b"3/0" * 50  # And comes again when it is needed.


def test_what_is_expected_is_fetched_meanwhile():
    images = Texts(6)
    images.expect([3, 0, 2, 1])
    images._here().thread.join()
    # What is damaged ends the thread, and is met again by whoever reads it.
    assert made == [("/x", 3), ("/x", 0), ("/x", 2)]
    images.expect([5])
    images._here().thread.join()
    assert made[-1] == ("/x", 5)
    images.read(25)
    assert made[-1] == ("/x", 5)


def test_no_more_is_expected_than_there_is_room_for(kept, monkeypatch, caplog):
    monkeypatch.setattr(blocks, "_cache", [BlockCache(kept, 4500)])
    images = Texts(30)
    assert "data.cache_gb: too small" in caplog.text
    images.expect([4, 5, 6, 7])
    images._here().thread.join()
    assert made == [("/x", 4), ("/x", 5)]


def test_a_block_that_a_crash_left_cut_is_made_again(kept):
    Texts(4).read(0)
    (path,) = kept.glob("*.block")
    path.write_bytes(path.read_bytes()[:-3])
    stale = kept / ".partial-x"
    stale.write_bytes(b"x")
    os.utime(stale, (time.time() - 1e6,) * 2)
    assert Texts(4).read(1) == b"0/1" * 50
    assert made == [("/x", 0)] * 2
    assert not stale.exists()


def test_a_forked_process_opens_for_itself():
    images = Texts(4)
    images.read(0)
    images.expect([1])
    if (child := os.fork()) == 0:
        try:
            assert images._here().open == {}
            images.expect([3])
            images._here().thread.join()
            os._exit(0 if images.read(15) == b"3/0" * 50 else 1)
        finally:
            os._exit(2)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    images._here().thread.join()


def test_a_folder_that_cannot_be_written_is_one_sentence(tmp_path):
    (tmp_path / "file").write_text("")
    keep_blocks_in(str(tmp_path / "file" / "blocks"), 1)
    with pytest.raises(ConfigError, match=r"^data\.cache: .*Not a directory"):
        Texts(4).read(0)


def test_the_folder_is_the_users_cache_unless_it_is_set(cache):
    keep_blocks_in("", 2)
    assert the_cache() == BlockCache(cache / "blocks", 2 * 10**9)
