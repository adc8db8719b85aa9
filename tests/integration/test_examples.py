"""The method in plain torch (examples/fd.py), beside the engine and as a person runs it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from launch import ROOT, base_environ, read_results, run_ranks

FILE = ROOT / "examples" / "fd.py"
PROGRAM = Path(__file__).parent / "programs" / "mirror.py"


@pytest.mark.parametrize("clip_norm", [100.0, 0.1])
def test_the_engine_learns_as_the_file_does(tmp_path: Path, clip_norm: float) -> None:
    run_ranks(PROGRAM, clip_norm, tmp_path, ranks=1, results=tmp_path, timeout=120, forked=False)
    [result] = read_results(tmp_path, 1)
    engine, file = (torch.tensor(result[of], dtype=torch.float64) for of in ("engine", "file"))
    assert len(engine) == 20
    assert engine[-1] < 0.8 * engine[0]
    is_clipping = max(result["norms"]) > clip_norm
    assert is_clipping == (clip_norm < 1)
    if is_clipping:  # The engine sums the norm over a flat shard, so in another order.
        assert ((engine - file).abs() / file.abs().max()).max() <= 3e-7
    else:
        assert result["engine"] == result["file"]
        assert (result["weights"], result["differing"]) == (44, [])


def started(*flags: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FILE), "--random-teacher", *map(str, flags)]
    return subprocess.run(
        command, env=base_environ(), capture_output=True, text=True, timeout=300, check=False
    )


def test_it_saves_a_student(tmp_path: Path) -> None:
    out = tmp_path / "student.pt"
    run = started("--steps", 2, "--batch", 2, "--out", out)
    assert run.returncode == 0, run.stderr
    assert torch.load(out, weights_only=True)["pos_embed"].shape == (1, 17, 192)


def test_maps_that_do_not_meet_and_a_folder_without_images_are_sentences(tmp_path: Path) -> None:
    for flag, flags in {
        "--patch": ("--teacher", "resnet18"),
        "--images": ("--images", tmp_path),
    }.items():
        run = started("--out", tmp_path / "student.pt", *flags)
        assert run.returncode == 1
        assert run.stderr.splitlines()[-1].startswith(flag)
        assert "Traceback" not in run.stderr
    assert len(FILE.read_text().splitlines()) <= 250
