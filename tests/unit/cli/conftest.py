import os
from pathlib import Path

import pytest
from command_fixtures import labelled_images, never_long, own_process, wide

__all__ = ["labelled_images", "never_long", "own_process", "wide"]


@pytest.fixture
def plain_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in list(os.environ):
        if name.startswith(("NCCL_", "GLOO_", "SLURM_")):
            monkeypatch.delenv(name)
    monkeypatch.setenv("FD_CACHE", str(tmp_path / "cache"))
