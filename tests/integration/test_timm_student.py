"""Students of timm: two ranks under ZeRO-3 against plain torch, resume, and out to timm."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from closeness import distance
from launch import read_results, run_ranks
from safetensors.torch import load_file

from fd_large.cli.export import export
from fd_large.engine.find_model import find_model
from fd_large.tasks.jobs import job_of

PROGRAM = Path(__file__).parent / "programs" / "timm_students.py"
sys.path.insert(0, str(PROGRAM.parent))

import scenarios  # noqa: E402
from timm_students import STUDENTS, UPDATES, student_run, write_weights  # noqa: E402

BOUND = 1e-5
# Maps of a convolutional model, tokens of one with checkpointing, running statistics of a third,
# batch statistics of a fourth.
IN_SUITE = ("convnextv2_atto", "vit_tiny_patch16_224", "resnet18", "mobilenetv3_small_050")
NAMES = [
    name if name in IN_SUITE else pytest.param(name, marks=pytest.mark.sweep) for name in STUDENTS
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    found = tmp_path_factory.mktemp("timm")
    write_weights(found / "resnet18.pth")
    return found


@pytest.fixture(scope="module", params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def results(name: str, folder: Path) -> list[dict[str, Any]]:
    run_ranks(PROGRAM, folder, name, ranks=2, timeout=400, results=folder)
    return read_results(folder, 2)


@pytest.mark.closeness
def test_two_ranks_have_the_losses_of_plain_torch(
    name: str, folder: Path, results: list[dict[str, Any]]
) -> None:
    plain = scenarios.plain_losses(student_run(name, folder), UPDATES)
    found = results[0]["losses"]
    assert distance(found, plain) <= BOUND
    assert found[-1] < found[0]


def test_a_resumed_run_is_the_same_to_the_bit(results: list[dict[str, Any]]) -> None:
    for rank in results:
        assert rank["same"]
        assert rank["resumed"] == rank["losses"][-len(rank["resumed"]) :]


def test_timm_loads_the_export_and_has_the_students_map(
    name: str, folder: Path, results: list[dict[str, Any]], tmp_path: Path
) -> None:
    run_dir, size = folder / name, student_run(name, folder).data.image_size
    images = torch.randn(2, 3, size, size)
    for form in ("timm", "fd"):
        out = tmp_path / form
        export(str(run_dir), str(out), form)
        maps = []
        for source in (run_dir, out):
            net, _ = find_model(str(source), job_of).build()
            maps.append(net.eval()(images).tokens.detach())
        assert torch.equal(*maps)
    theirs = timm.create_model(f"local-dir:{tmp_path / 'timm'}", pretrained=True).eval()
    theirs.load_state_dict(load_file(tmp_path / "timm" / "model.safetensors"))  # Strict.
    with torch.no_grad():
        features = theirs.forward_features(images)
    if features.dim() == 4:
        is_last = features.shape[-1] == net.width
        features = features.flatten(1, 2) if is_last else features.flatten(2).transpose(1, 2)
    assert torch.equal(features[:, -maps[0].shape[1] :], maps[0])
    heads = [t for n, t in theirs.state_dict().items() if n.startswith(("head.norm", "fc_norm"))]
    assert all(t.unique().numel() == 1 for t in heads)
