"""Fixtures of tests that call commands in the process of the test."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from fd_large.runtime import display


@pytest.fixture(autouse=True)
def never_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command says on stderr while it lasts would stand among its errors here."""
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", float("inf"))


@pytest.fixture(autouse=True)
def wide(monkeypatch: pytest.MonkeyPatch) -> None:
    """A path of any length stands in one line."""
    monkeypatch.setenv("COLUMNS", "400")


@pytest.fixture(autouse=True)
def own_process() -> Iterator[None]:
    """A command that fails leaves its process group, and the environment of it, to its process."""
    before = dict(os.environ)
    yield
    if "fd_large.engine.zero.start" in sys.modules:
        sys.modules["fd_large.engine.zero.start"].stop()
    if "fd_large.ranks.distributed" in sys.modules:
        sys.modules["fd_large.ranks.distributed"].stop()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture
def labelled_images(tmp_path: Path) -> Path:
    """A folder of red, green and blue noise, by color: 30 images to learn from, 12 to test."""
    from labelled_folder import labelled_folder, noise

    def pixels(generator, label):
        image = noise(generator, 70, 70, levels=60)
        image[..., label] += 150
        return image

    return labelled_folder(
        tmp_path / "data", train=30, val=12, classes=3, pixels=pixels, test_split="test"
    )
