"""Who asks a hub, and who reads the cache; ranks are threads and the hub is a stand-in."""

from __future__ import annotations

import contextvars
from contextlib import contextmanager

import huggingface_hub
import pytest
import timm
from pretended_ranks import World

from fd_large.backbones import download as download_module
from fd_large.backbones.download import download, downloaded
from fd_large.backbones.timm import published
from fd_large.errors import WeightsError
from fd_large.ranks import distributed, meeting
from fd_large.weights.download import locate

is_offline = contextvars.ContextVar("is_offline", default=False)


@pytest.fixture
def ranks_as_processes(monkeypatch):
    """What a process keeps to itself each rank keeps to itself."""

    @contextmanager
    def offline():
        token = is_offline.set(True)
        try:
            yield
        finally:
            is_offline.reset(token)

    monkeypatch.setattr(download_module, "_cached", PerRank())
    monkeypatch.setattr(download_module, "_offline", offline)


class PerRank(set):
    def __contains__(self, what):
        return super().__contains__((distributed.rank(), what))

    def add(self, what):
        super().add((distributed.rank(), what))


class Hub:
    """A hub, and the caches of its clients.

    Args:
        caches: Rank -> name of the cache that it sees.
    """

    def __init__(self, caches):
        self.caches, self.full, self.asked, self.read = caches, set(), [], []

    def get(self, *_, **__):
        rank = distributed.rank()
        cache = self.caches[rank]
        if is_offline.get():
            if cache not in self.full:
                raise WeightsError("not in the cache")
        else:
            self.asked.append(rank)
            self.full.add(cache)
        self.read.append(rank)
        return "/cache/model"


@pytest.mark.parametrize(
    ("caches", "asked"),
    [("aaaaaa", [0]), ("aabbcc", [0, 2, 4])],
    ids=["a shared cache", "a cache a node"],
)
def test_a_hub_is_asked_once_for_each_cache(ranks_as_processes, monkeypatch, caches, asked):
    world, hub = World(monkeypatch, 6), Hub(caches)
    work = lambda: meeting.meet(lambda: downloaded("hf:a/b", hub.get))  # noqa: E731
    assert world.run(work) == ["/cache/model"] * 6
    assert sorted(hub.asked) == asked
    # Later in the same start, outside of a meeting as well, nobody asks.
    assert world.run(lambda: downloaded("hf:a/b", hub.get)) == ["/cache/model"] * 6
    assert sorted(hub.asked) == asked


def test_what_is_downloaded_ahead_is_read_by_one_rank_a_cache(ranks_as_processes, monkeypatch):
    world, hub = World(monkeypatch, 4), Hub("aabb")
    world.run(lambda: meeting.meet(lambda: download("timm:x", hub.get)))
    assert sorted(hub.read) == sorted(hub.asked) == [0, 2]
    world.run(lambda: downloaded("timm:x", hub.get))
    assert len(hub.asked) == 2


def test_what_cannot_be_had_is_told_by_all(ranks_as_processes, monkeypatch):
    world, asked = World(monkeypatch, 4), []

    def get():
        asked.append(distributed.rank())
        raise WeightsError("--teacher.source: cannot be fetched")

    for error in world.run(lambda: meeting.meet(lambda: downloaded("hf:a/b", get))):
        assert str(error) == "--teacher.source: cannot be fetched"
    assert asked == [0]


def test_sources_of_hugging_face_and_timm_are_downloaded_so(
    ranks_as_processes, monkeypatch, tmp_path
):
    hub = Hub("aaaa")
    monkeypatch.setattr(huggingface_hub, "snapshot_download", hub.get)
    monkeypatch.setattr(timm, "create_model", hub.get)
    world = World(monkeypatch, 4)
    found = world.run(lambda: meeting.meet(lambda: locate("hf:someone/vit").path))
    assert list(map(str, found)) == ["/cache/model"] * 4
    assert hub.asked == [0]
    monkeypatch.setattr(published, "_statistics", lambda name: None)
    world.run(lambda: meeting.meet(lambda: published.fetch("resnet18", "--teacher.source")))
    world.run(lambda: published.load("resnet18", "--teacher.source"))
    assert hub.asked == [0, 0]


@pytest.fixture(autouse=True)
def library(monkeypatch):
    """Ranks that are threads here share the library's switch, and may leave it turned."""
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)


def test_offline_is_what_the_library_calls_so():
    with download_module._offline():
        assert huggingface_hub.is_offline_mode()
    assert not huggingface_hub.is_offline_mode()
