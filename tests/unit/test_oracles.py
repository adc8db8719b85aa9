"""The published numbers: `tests/oracles/oracles.py` on the folder of FD_ORACLES.

But for training runs, which are replayed on ranks: tests/integration/test_training_oracles.py.
"""

from __future__ import annotations

import json

import oracles
import pytest
import torch
from oracle_files import FOLDER
from oracles_models import Skipped
from safetensors.torch import load_file, save_file

needs_oracles = pytest.mark.skipif(
    not FOLDER.is_dir(), reason=f"no oracles at {FOLDER}; set FD_ORACLES to their folder"
)


@needs_oracles
@pytest.mark.parametrize(
    "path",
    sorted(path for path in FOLDER.glob("*.json") if "_training_run" not in path.name),
    ids=lambda path: path.stem,
)
def test_oracle(path):
    verdict = oracles.check_file(path)
    assert not verdict.failed, f"{verdict.text}, worst {verdict.worst}"
    if verdict.text.startswith(("not yet", "left out")):
        pytest.skip(verdict.text)


@needs_oracles
@pytest.mark.parametrize(
    "path",
    sorted([*FOLDER.glob("dense/*.json"), *FOLDER.glob("multi/*.json")]),
    ids=lambda path: f"{path.parent.name}-{path.stem}",
)
def test_oracle_in_float64(path):
    verdict = oracles.check_file(path, torch.float64)
    assert not verdict.failed, f"{verdict.text}, worst {verdict.worst}"
    if verdict.text.startswith(("not yet", "left out")):
        pytest.skip(verdict.text)
    assert verdict.worst.error < 1e-6


@needs_oracles
@pytest.mark.parametrize("name", ["fd_swinv2_a", "fd_vit_shared_rpb_a", "fd_teacher_esvit"])
def test_float64_is_below_a_millionth(name):
    verdict = oracles.check_file(FOLDER / f"{name}.json", torch.float64)
    assert verdict.worst.error < 1e-6


@needs_oracles
def test_any_name_will_do_and_mistakes_show(tmp_path):
    spec = (FOLDER / "fd_swinv2_a.json").read_text()
    tensors = load_file(FOLDER / "fd_swinv2_a.safetensors")
    (tmp_path / "renamed.json").write_text(spec)
    save_file(tensors, tmp_path / "renamed.safetensors")
    assert oracles.main([str(tmp_path)]) == 0
    tensors["grad.layers.0.blocks.0.attn.q_bias"] *= 1.001
    save_file(tensors, tmp_path / "renamed.safetensors")
    assert oracles.main([str(tmp_path)]) == 1


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
