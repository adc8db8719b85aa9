"""The published numbers: `tests/oracles/oracles.py` on those in tests/oracles/files and FD_ORACLES.

But for training runs, which are replayed on ranks: tests/integration/test_training_oracles.py.
"""

from __future__ import annotations

import json

import oracles
import pytest
import torch
from oracle_files import FILES, oracle_paths
from oracles_models import Skipped
from safetensors.torch import load_file, save_file


@pytest.mark.parametrize(
    "path",
    [path for path in oracle_paths("*", "masked/*") if "_training_run" not in path.name],
    ids=lambda path: path.stem,
)
def test_oracle(path):
    verdict = oracles.check_file(path)
    assert not verdict.failed, f"{verdict.text}, worst {verdict.worst}"
    if verdict.text.startswith(("not yet", "left out")):
        pytest.skip(verdict.text)


@pytest.mark.parametrize(
    "path",
    oracle_paths("dense/*", "multi/*", "masked/*"),
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_oracle_in_float64(path):
    verdict = oracles.check_file(path, torch.float64)
    assert not verdict.failed, f"{verdict.text}, worst {verdict.worst}"
    if verdict.text.startswith(("not yet", "left out")):
        pytest.skip(verdict.text)
    assert verdict.worst.error < 1e-6


@pytest.mark.parametrize(
    "name", ["fd_swinv2_b_shared_rpb", "fd_vit_shared_rpb_a", "fd_teacher_esvit_s3"]
)
def test_float64_is_below_a_millionth(name):
    verdict = oracles.check_file(FILES / f"{name}.json", torch.float64)
    assert verdict.worst.error < 1e-6


def test_any_name_will_do_and_mistakes_show(tmp_path):
    spec = (FILES / "fd_vit_shared_rpb_a.json").read_text()
    tensors = load_file(FILES / "fd_vit_shared_rpb_a.safetensors")
    (tmp_path / "renamed.json").write_text(spec)
    save_file(tensors, tmp_path / "renamed.safetensors")
    assert oracles.main([str(tmp_path)]) == 0
    tensors["grad.blocks.0.attn.q_bias"] *= 1.001
    save_file(tensors, tmp_path / "renamed.safetensors")
    assert oracles.main([str(tmp_path)]) == 1


def test_where_each_file_comes_from_stands_beside_it():
    table = (FILES / "README.md").read_text()
    names = [path.relative_to(FILES).with_suffix("").as_posix() for path in FILES.rglob("*.json")]
    assert [name for name in names if f"| {name} |" not in table] == []
    assert len(names) == table.count("\n| ") - 1


def test_unknown_kinds_and_lonely_tensors_fail(tmp_path):
    (tmp_path / "a.json").write_text('{"config": {"class_": "Unheard"}}')
    save_file({"x": torch.zeros(1)}, tmp_path / "b.safetensors")
    verdicts = oracles.check_folder(tmp_path)
    assert [v.failed for v in verdicts] == [True, True]
    assert oracles.main([str(tmp_path)]) == 1


def test_an_empty_folder_is_no_success(tmp_path):
    assert oracles.main([str(tmp_path)]) == 1
    assert oracles.main([str(tmp_path / "missing")]) == 2


def test_left_out_files_say_why(tmp_path, monkeypatch):
    monkeypatch.setitem(oracles.CHECKS, "fd_loss", lambda *a: Skipped("left out", "a reason"))
    keys = {"student_width": 1, "teacher_width": 1, "beta": 2}
    (tmp_path / "a.json").write_text(json.dumps({"config": keys}))
    assert oracles.check_folder(tmp_path)[0].text == "left out: a reason"
    assert oracles.main([str(tmp_path)]) == 0
