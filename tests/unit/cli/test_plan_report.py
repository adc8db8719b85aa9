"""What `plan` prints."""

from types import SimpleNamespace

import pytest

from fd_large.cli import main as cli
from fd_large.runtime import disks


@pytest.mark.parametrize("columns", [80, 120])
def test_the_tables_fit_the_terminal(columns, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", str(columns))
    words = "--recipe fd_swinv2g --gpus 256 --batch.global_batch_size 8192 --rows 30"
    assert cli.main(["plan", *words.split()]) == 0
    told = capsys.readouterr().out
    assert "\N{HORIZONTAL ELLIPSIS}" not in told, "a cell lost its end"
    assert "3 + hpZ" in told
    assert "replicated" in told
    assert ("comm." in told) == (columns == 120)


@pytest.mark.parametrize("free", [1e9, 1e15])
def test_whether_a_disk_holds_the_state_is_said(free, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(disks, "check_state_folder", lambda folder, needed: None)
    monkeypatch.setattr(disks, "write_speed", lambda folder: 2e9)
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=free))
    words = f"--recipe fd_swinv2g --gpus 8 --engine.nvme_path {tmp_path}"
    assert cli.main(["plan", *words.split()]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "more for each step at the 2.00 GB/s" in told
    assert ("TOO LITTLE" in told) == (free == 1e9)
