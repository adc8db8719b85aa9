"""What `plan` prints."""

from types import SimpleNamespace

import pytest

from fd_large.cli import main as cli
from fd_large.cli.plan_report import figures
from fd_large.plan.step_time import Between
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


def test_seconds_and_hours_have_two_figures():
    assert figures(Between(0.0998, 0.1724)) == "0.10-0.17"
    assert figures(Between(9.96, 12.3)) == "10-12"
    assert figures(Between(792.4, 1238.0)) == "790-1,200"
    assert figures(Between(0.0001, 0.0127)) == "<0.001-0.013"
    assert figures(Between(0.0, 0.0)) == "<0.001"


def test_columns_and_paragraphs_of_a_plan_at_80_columns(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    assert cli.main(["plan", "--recipe", "fd_clip_vit_base", "--rows", "12"]) == 0
    lines = [line.rstrip() for line in capsys.readouterr().out.splitlines()]
    rows = [line.split() for line in lines if "replicated" in line]
    for row in rows:
        for cell in row[-3:]:  # Seconds of a step, hours, GPU-hours.
            low, high = (float(end.replace(",", "")) for end in cell.split("-"))
            most = 1.6 / 0.5 if row[0] == "3" else 1.25 / 0.8
            assert 0.9 * 1.25 / 0.8 < high / low < 1.1 * most
    first = next(
        n for n, line in enumerate(lines) if line.startswith("These times are computed from data")
    )
    said = " ".join(lines[first : first + 4])
    assert "0.8 to 1.25 times the computed time (0.5 to 1.6 times for ZeRO-3's hooks)" in said
    assert said.endswith("--probe measures this machine")
    assert all(len(line) > 60 for line in lines[first : first + 3]), "wrapped once"


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
