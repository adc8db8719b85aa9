from __future__ import annotations

import multiprocessing
import os
import pickle
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
from pretended_ranks import World

from fd_large.data import listing
from fd_large.data.folder import ImageFolder
from fd_large.data.listing import Listing, filled, listed
from fd_large.ranks import distributed, meeting

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


def _list_slowly(anchor: str, marks: Path, start) -> None:
    listing.CACHED_FROM = 1
    start.wait()

    def fill(add):
        (marks / str(os.getpid())).touch()
        time.sleep(0.3)
        for number in range(100):
            add(f"{number}.jpg".encode())
        return {}

    make = partial(filled, (), fill)
    assert len(listed("k", anchor, make=make, is_current=lambda facts: True)) == 100


def test_of_several_runs_one_walks_and_the_others_wait(tmp_path):
    (marks := tmp_path / "marks").mkdir()
    context = multiprocessing.get_context("fork")
    start = context.Barrier(4)
    arguments = (str(tmp_path), marks, start)
    runs = [context.Process(target=_list_slowly, args=arguments) for _ in range(4)]
    for run in runs:
        run.start()
    for run in runs:
        run.join(60)
        assert run.exitcode == 0
    assert len(list(marks.iterdir())) == 1


def test_columns_and_facts_come_back(tmp_path, cache):
    def fill(add):
        for number in range(5):
            add(b"n" * number, number, -number)
        return {"stamps": [1], "what": "kept"}

    make = partial(filled, ("one", "two"), fill)
    for _ in range(2):  # made, then read
        found = listed("k", str(tmp_path), make=make, is_current=lambda facts: True)
        assert isinstance(found, Listing)
        assert [found.name(i) for i in range(5)] == [b"n" * i for i in range(5)]
        assert [found.number("one", i) for i in range(5)] == list(range(5))
        assert [found.number("two", i) for i in range(5)] == [-i for i in range(5)]
        assert found.facts["what"] == "kept"
        assert "stamps" not in found.facts
    assert len(files(cache)) == 1


@pytest.fixture
def forest(tmp_path):
    """Returns a folder of so many folders of three images."""

    def grow(folders: int) -> Path:
        root = tmp_path / f"{folders} folders"
        for number in range(3 * folders):
            (root / f"{number % folders:03}").mkdir(parents=True, exist_ok=True)
            (root / f"{number % folders:03}" / f"{number}.jpg").touch()
        age(root)
        return root

    return grow


def open_on_ranks(world: World, root: Path, count: int) -> list[ImageFolder]:
    opened = world.run(lambda: meeting.meet(lambda: ImageFolder(root)))
    wanted = sorted(str(path.relative_to(root)) for path in root.rglob("*.jpg"))
    assert [names(folder) for folder in opened] == [wanted] * world.ranks
    assert len(wanted) == count
    return opened


@pytest.mark.parametrize("kept", ["kept", "not kept"])
def test_only_rank_0_looks_at_the_files(forest, tmp_path, monkeypatch, cache, kept):
    """What the others do does not grow with the dataset; where nothing is kept, nor does that."""
    if kept == "not kept":
        monkeypatch.setenv("FD_CACHE", "/proc/nowhere")
    others = {}
    for folders in (2, 40):
        root = forest(folders)
        world = World(monkeypatch, 8, ranks_a_node=4, below=(root, cache))
        for start in ("first", "second"):
            open_on_ranks(world, root, 3 * folders)
            assert [done["scandir"] for done in world.done[1:]] == [0] * 7
            others.setdefault(start, []).append(world.done[1:])
            walked = start == "first" or kept == "not kept"
            assert (world.done[0]["scandir"] > folders) == walked
            assert world.done[0]["stat"] > folders
        assert max(done.total() for done in world.done[1:]) < 20
    for small, large in others.values():
        assert small == large


def test_a_node_without_the_others_cache_is_sent_the_list_once(forest, tmp_path, monkeypatch):
    root = forest(5)
    world = World(monkeypatch, 4, below=(root,))
    monkeypatch.setattr(
        listing, "cache_folder", lambda: tmp_path / f"cache of {distributed.node_name()}"
    )
    open_ = listing._open

    def on_a_disk_of_the_node(path):
        if f"cache of {distributed.node_name()}" not in str(path):
            raise FileNotFoundError(path)
        return open_(path)

    monkeypatch.setattr(listing, "_open", on_a_disk_of_the_node)
    for opened in open_on_ranks(world, root, 15):
        assert opened._listing.path.exists()
    assert {done["scandir"] for done in world.done[1:]} == {0}
    for node in ("n0", "n1"):
        assert len(files(tmp_path / f"cache of {node}")) == 1
    monkeypatch.setattr(ImageFolder, "_fill", None)
    open_on_ranks(world, root, 15)  # Each node's file serves the next start.


def test_a_node_with_a_disk_of_its_own_lists_that_once(forest, monkeypatch, walks):
    root = forest(5)
    identity = listing._identity
    monkeypatch.setattr(
        listing, "_identity", lambda anchor: (distributed.node_name(), *identity(anchor))
    )
    monkeypatch.setattr(
        listing, "_path", lambda what, anchor: root.parent / distributed.node_name() / "x.listing"
    )
    open_on_ranks(World(monkeypatch, 6), root, 15)
    assert len(walks) == 3


def test_clients_that_number_the_device_otherwise_share_the_list(tree, walks, monkeypatch):
    ImageFolder(tree)
    stat = os.stat

    def on_another_client(path, *args, **options):
        status = stat(path, *args, **options)
        return SimpleNamespace(
            **{name: getattr(status, name) for name in dir(status) if name.startswith("st_")}
            | {"st_dev": status.st_dev + 7}
        )

    monkeypatch.setattr(os, "stat", on_another_client)
    assert os.stat(tree).st_dev == stat(tree).st_dev + 7
    ImageFolder(tree)
    assert len(walks) == 1


def test_a_mistake_of_rank_0_is_everybodys(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    world = World(monkeypatch, 4)
    for error in world.run(lambda: meeting.meet(lambda: ImageFolder(tmp_path / "empty"))):
        assert str(error).startswith("data.root: no image in the folder")
