"""The command statistics: how it ends when a signal stops it."""

from __future__ import annotations

import os
import signal

import pytest

from fd_large.cli import statistics
from fd_large.cli.main import main
from fd_large.ranks.processes import SIGNALS


@pytest.fixture(autouse=True)
def _handlers():
    before = {number: signal.getsignal(number) for number in SIGNALS}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_it_with_one_sentence(number, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(statistics, "measure", lambda *_, **__: os.kill(os.getpid(), number))
    out = str(tmp_path / "found.safetensors")
    assert main(["statistics", "--deepspeed_config", "zero1", "--out", out]) == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("statistics: stopped before the end; got a signal")
    assert "same command again" in line


def test_a_target_where_a_recipe_has_one_teacher(tmp_path, capsys):
    words = ["--deepspeed_config", "zero1", "--out", str(tmp_path / "found.safetensors")]
    assert main(["statistics", *words, "--target", "clop"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("--target: ")
    assert line.endswith("Leave out --target.")
