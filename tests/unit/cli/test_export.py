"""The command `export`: mistakes that its flags show; weights/test_export.py has the rest."""

from __future__ import annotations

import pytest

from fd_large.cli.main import main
from fd_large.errors import Exit

RIGHT = {"--license": "apache-2.0", "--base_model": "openai/clip-vit-base-patch16"}


@pytest.mark.parametrize(
    "wrong",
    [
        {"--license": "MIT License"},
        {"--base_model": "clip-vit-base-patch16"},
        {"--license": "Apache-2.0", "--base_model": "https://huggingface.co/openai/clip"},
    ],
    ids=str,
)
def test_each_mistake_about_the_card_is_a_line_that_names_its_flag(wrong, tmp_path, capsys):
    out = tmp_path / "out"
    words = [word for flag in (RIGHT | wrong).items() for word in flag]
    assert main(["export", str(tmp_path), str(out), "--to", "timm", *words]) == Exit.MISTAKE
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(":")[0] for line in lines] == list(wrong)
    for line, (flag, value) in zip(lines, wrong.items(), strict=True):
        assert f"got {value}, " in line
        assert line.endswith(f" {flag}.")  # The remedy: what to change.
    assert not out.exists()
