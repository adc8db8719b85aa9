from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from pathlib import Path

import pytest

from fd_large.data import listing
from fd_large.data.folder import ImageFolder
from fd_large.data.listing import Listing, listed

OLD = time.time_ns() - 60 * 10**9


@pytest.fixture(autouse=True)
def small_listings_are_kept(monkeypatch):
    monkeypatch.setattr(listing, "CACHED_FROM", 3)


@pytest.fixture
def tree(tmp_path) -> Path:
    root = tmp_path / "tree"
    for name in ("a/1.jpg", "a/2.jpg", "b/3.jpg", "4.jpg"):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    age(root)
    return root


def age(root: Path) -> None:
    for folder in (root, *(path for path in root.rglob("*") if path.is_dir())):
        os.utime(folder, ns=(OLD, OLD))


def names(folder: ImageFolder) -> list[str]:
    return [os.path.relpath(folder[i], folder.root) for i in range(len(folder))]


def files(cache: Path) -> list[str]:
    return sorted(path.name for path in (cache / "listings").glob("*.listing"))


@pytest.fixture
def walks(monkeypatch) -> list[str]:
    """A line for each time a folder is walked over."""
    done: list[str] = []
    fill = ImageFolder._fill

    def counted(self, add):
        done.append(self.root)
        return fill(self, add)

    monkeypatch.setattr(ImageFolder, "_fill", counted)
    return done


def test_an_unchanged_folder_is_walked_over_once(tree, cache, walks):
    first, second = ImageFolder(tree), ImageFolder(tree)
    assert names(first) == names(second) == ["4.jpg", "a/1.jpg", "a/2.jpg", "b/3.jpg"]
    assert first.fingerprint == second.fingerprint
    assert len(walks) == len(files(cache)) == 1
    assert not list((cache / "listings").glob(".partial-*"))


@pytest.mark.parametrize(
    "change",
    [
        lambda root: (root / "b/5.jpg").touch(),
        lambda root: (root / "a/1.jpg").unlink(),
        lambda root: (root / "a/1.jpg").rename(root / "a/0.jpg"),
        lambda root: (root / "a").rename(root / "c"),
        lambda root: (root / "d").mkdir(),
    ],
    ids=["added", "removed", "renamed", "folder renamed", "folder added"],
)
def test_a_changed_folder_is_walked_over_again(tree, walks, change):
    ImageFolder(tree)
    change(tree)
    wanted = sorted(str(path.relative_to(tree)) for path in tree.rglob("*.jpg"))
    assert names(ImageFolder(tree)) == wanted
    assert len(walks) == 2


def test_a_folder_changed_just_before_is_not_trusted(tree, walks):
    """A file that came within the same tick of the clock would leave the time as it is."""
    (tree / "b/5.jpg").touch()
    for _ in range(2):
        ImageFolder(tree)
    assert len(walks) == 2


def test_another_folder_of_the_same_path_is_another(tree, walks):
    ImageFolder(tree)
    tree.rename(tree.with_name("moved"))
    (tree / "x").mkdir(parents=True)
    for number in range(5):
        (tree / f"x/{number}.jpg").touch()
    age(tree)
    assert len(ImageFolder(tree)) == 5


@pytest.mark.parametrize(
    "damage", [lambda x: b"", lambda x: x[:-1], lambda x: x[100:], lambda x: b"\0" * len(x)]
)
def test_a_damaged_file_is_made_again(tree, cache, walks, damage):
    ImageFolder(tree)
    path = cache / "listings" / files(cache)[0]
    path.write_bytes(damage(path.read_bytes()))
    assert len(ImageFolder(tree)) == 4
    assert len(ImageFolder(tree)) == 4
    assert len(walks) == 2


@pytest.mark.parametrize("place", ["a file", "/proc/nowhere"])
def test_without_a_cache_folder_to_write_to_all_goes_on(tree, tmp_path, monkeypatch, walks, place):
    (tmp_path / "a file").touch()
    monkeypatch.setenv("FD_CACHE", str(tmp_path / place))
    for _ in range(2):
        folder = ImageFolder(tree)
        assert len(folder) == 4
        assert names(pickle.loads(pickle.dumps(folder))) == names(folder)
    assert len(walks) == 2


def test_a_small_listing_leaves_no_file(tree, cache, monkeypatch):
    monkeypatch.setattr(listing, "CACHED_FROM", 5)
    folder = ImageFolder(tree)
    assert files(cache) == []
    assert names(pickle.loads(pickle.dumps(folder))) == names(folder)


def test_a_worker_that_is_not_forked_gets_the_file_not_the_names(tmp_path):
    root = tmp_path / "tree"
    root.mkdir()
    for number in range(2000):
        (root / f"{number:05}.jpg").touch()
    age(root)
    folder = ImageFolder(root)
    assert len(pickle.dumps(folder)) < 1000
    assert names(pickle.loads(pickle.dumps(folder))) == names(folder)


def test_where_to_look(monkeypatch, tmp_path):
    monkeypatch.delenv("FD_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert listing.cache_folder() == Path("/somewhere/fd_large")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/home/one")
    assert listing.cache_folder() == Path("/home/one/.cache/fd_large")


def _list_slowly(key: str, marks: Path, start) -> None:
    listing.CACHED_FROM = 1
    start.wait()

    def fill(add):
        (marks / str(os.getpid())).touch()
        time.sleep(0.3)
        for number in range(100):
            add(f"{number}.jpg".encode())
        return {}

    found = listed(key, fill=fill, is_current=lambda facts: True)
    assert len(found) == 100


def test_of_several_ranks_one_walks_and_the_others_wait(tmp_path):
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    ranks = [context.Process(target=_list_slowly, args=("k", tmp_path, start)) for _ in range(4)]
    for rank in ranks:
        rank.start()
    for rank in ranks:
        rank.join(60)
        assert rank.exitcode == 0
    assert len(list(tmp_path.iterdir())) == 1


def test_columns_and_facts_come_back(cache):
    def fill(add):
        for number in range(5):
            add(b"n" * number, number, -number)
        return {"stamps": [1], "what": "kept"}

    for _ in range(2):  # made, then read
        found = listed("k", columns=("one", "two"), fill=fill, is_current=lambda facts: True)
        assert isinstance(found, Listing)
        assert [found.name(i) for i in range(5)] == [b"n" * i for i in range(5)]
        assert [found.number("one", i) for i in range(5)] == list(range(5))
        assert [found.number("two", i) for i in range(5)] == [-i for i in range(5)]
        assert found.facts["what"] == "kept"
        assert "stamps" not in found.facts
    assert len(files(cache)) == 1
