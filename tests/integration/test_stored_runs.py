"""Run folders of the first release still resume, report and export."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import distance
from launch import ROOT, run_ranks
from PIL import Image

from fd_large.cli.main import main

STORED = ROOT / "tests" / "stored_runs"
TRAIN = ROOT / "fd_large" / "train.py"


def copied(name: str, tmp_path: Path) -> Path:
    shutil.copytree(STORED / name, tmp_path / name)
    return tmp_path / name


def write_labelled(root: Path) -> Path:
    """Writes 24 images of 32 px to train on and 9 for tests, of three classes."""
    generator = np.random.Generator(np.random.PCG64(7))
    for split, count in (("train", 24), ("val", 9)):
        for number in range(count):
            folder = root / split / f"class{number % 3}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = generator.integers(0, 256, (4, 4, 3), dtype=np.uint8)
            coarse[..., number % 3] //= 3
            # Repeated, not resized: nothing that another release of PIL would round differently.
            pixels = coarse.repeat(8, axis=0).repeat(8, axis=1)
            Image.fromarray(pixels).save(folder / f"{number:02d}.png")
    return root


@pytest.mark.closeness
@pytest.mark.parametrize("name", ["distillation", "finetuning"])
def test_it_resumes_and_reports(name, tmp_path, capsys):
    kernels = torch.backends.cpu.get_cpu_capability()
    if name == "distillation" and kernels not in ("AVX2", "AVX512"):
        pytest.skip(f"its random teacher has other bits by torch's {kernels} kernels")
    folder = copied(name, tmp_path)
    assert main(["report", str(folder)]) == 0
    assert "5 of 16" in capsys.readouterr().out
    expected = json.loads((folder / "expected.json").read_text())
    flags = [
        str(write_labelled(tmp_path / "images")) if flag == "LABELLED" else flag
        for flag in expected["flags"]
    ]
    config = ROOT / "ds_configs" / "zero1.json"
    words = ["--deepspeed_config", config, "--runtime.run_dir", folder, *flags]
    run_ranks(TRAIN, *words, ranks=1)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == list(range(16))
    # One rank in place of two, and perhaps another processor: the last digits may differ.
    assert distance([row["loss"] for row in rows], expected["loss"]) <= 1e-6
    assert json.loads((folder / "summary.json").read_text())["status"] == "done"


@pytest.mark.parametrize("to", ["fd", "timm", "hf"])
def test_its_student_is_exported(to, tmp_path):
    folder = copied("distillation", tmp_path)
    assert main(["export", str(folder), "--to", to, str(tmp_path / "out")]) == 0
    assert any((tmp_path / "out").glob("*.safetensors")) or any((tmp_path / "out").glob("*.pth"))


def test_a_damaged_copy_is_named(tmp_path, capsys):
    folder = copied("finetuning", tmp_path)
    file = next(folder.glob("checkpoints/*/rank_00000.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["checkpoint", "verify", str(folder)]) != 0
    assert "rank_00000" in "".join(capsys.readouterr())
