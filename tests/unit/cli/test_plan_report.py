"""What `plan` prints."""

import pytest

from fd_large.cli import main as cli


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
