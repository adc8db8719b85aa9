"""The command `export`: mistakes that its flags show; weights/test_export.py has the rest."""

from __future__ import annotations

import json

import pytest
from own_net import NET
from stored_run import store_student

from fd_large import doors
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


def test_the_hash_is_that_of_the_file_which_the_run_used(tmp_path, caplog):
    code, run = tmp_path / "net.py", str(tmp_path / "run")
    code.write_text(NET)
    doors.allow(code)
    name = f"module:{code}:Net"
    used = doors.hashes(name)
    store_student(tmp_path / "run", name, {}, facts={"code": used})
    code.write_text(f"{NET}\n# Edited.\n")
    for to in ("fd", "program"):
        out = tmp_path / to
        doors.reset()
        caplog.clear()
        assert main(["export", run, str(out), "--to", to, "--allow-code", str(code)]) == 0
        assert f"{name} is NOT THE FILE that made this model" in caplog.text
        config = json.loads((out / "config.json").read_text())["fd_large"]
        assert config["code_sha256"] == used[name]
        assert used[name] in (out / "README.md").read_text()
