"""Run folders of earlier versions still resume, report and export."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from closeness import distance
from launch import ROOT, run_ranks
from PIL import Image
from safetensors.torch import load_file

from fd_large.cli.main import main

# Of commit 78bd8269: a length that optim.max_seconds decided, data.stage_to, the own Swin V1.
WITH_WHAT_LEFT = ("time_box", "staging", "swin")
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
@pytest.mark.parametrize("name", ["distillation", "finetuning", *WITH_WHAT_LEFT])
def test_it_resumes_and_reports(name, tmp_path, capsys):
    kernels = torch.backends.cpu.get_cpu_capability()
    folder = copied(name, tmp_path)
    is_random = json.loads((folder / "recipe.json").read_text())["teacher"]["source"] == "random"
    if is_random and kernels not in ("AVX2", "AVX512"):
        pytest.skip(f"its random teacher has other bits by torch's {kernels} kernels")
    expected = json.loads((folder / "expected.json").read_text())
    total = len(expected["loss"])
    assert main(["report", str(folder)]) == 0
    shown = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert f"{expected['stopped_after']} of {total} steps" in " ".join(shown[0])
    assert all(line.split() in shown for line in expected.get("report", ()))
    images = str(write_labelled(tmp_path / "images"))
    flags = [flag.replace("LABELLED", images) for flag in expected["flags"]]
    config = ROOT / "ds_configs" / "zero1.json"
    words = ["--deepspeed_config", config, "--runtime.run_dir", folder, *flags]
    run_ranks(TRAIN, *words, ranks=1)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["update"] for row in rows] == list(range(total))
    # One rank in place of two, and perhaps another processor: the last digits may differ.
    assert distance([row["loss"] for row in rows], expected["loss"]) <= 1e-6
    assert json.loads((folder / "summary.json").read_text())["status"] == "done"


@pytest.mark.parametrize("to", ["fd", "timm", "hf"])
def test_its_student_is_exported(to, tmp_path):
    folder = copied("distillation", tmp_path)
    assert main(["export", str(folder), "--to", to, str(tmp_path / "out")]) == 0
    assert any((tmp_path / "out").glob("*.safetensors")) or any((tmp_path / "out").glob("*.pth"))


@pytest.mark.parametrize("name", WITH_WHAT_LEFT)
def test_its_student_is_exported_to_the_bit(name, tmp_path):
    folder = copied(name, tmp_path)
    assert main(["export", str(folder), "--to", "fd", str(tmp_path / "out")]) == 0
    tensors, digest = load_file(tmp_path / "out" / "model.safetensors"), hashlib.sha256()
    for key in sorted(tensors):
        digest.update(key.encode())
        digest.update(tensors[key].numpy().tobytes())
    assert digest.hexdigest() == json.loads((folder / "expected.json").read_text())["exported"]


def test_a_damaged_copy_is_named(tmp_path, capsys):
    folder = copied("finetuning", tmp_path)
    file = next(folder.glob("checkpoints/*/rank_00000.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert main(["checkpoint", "verify", str(folder)]) != 0
    assert "rank_00000" in "".join(capsys.readouterr())
