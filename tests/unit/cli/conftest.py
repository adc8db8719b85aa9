import os
from pathlib import Path

import pytest

from fd_large.runtime import display


@pytest.fixture(autouse=True)
def never_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """What a command says on stderr while it lasts would stand among its errors here."""
    monkeypatch.setattr(display, "SECONDS_BETWEEN_LINES", float("inf"))


@pytest.fixture
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("NCCL_", "GLOO_", "SLURM_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("FD_CACHE", str(tmp_path / "cache"))
