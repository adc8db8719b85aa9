"""Several nodes: all are told of the one that differs."""

from __future__ import annotations

import shutil
import tarfile
from pathlib import Path

import pytest
import torch
from launch import ROOT, read_results, run_ranks
from PIL import Image
from safetensors.torch import save_file
from twin import losses, train

PROGRAM = ROOT / "tests/integration/programs/nodes.py"


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """32 images in two shards."""
    root = tmp_path_factory.mktemp("shards")
    loose = tmp_path_factory.mktemp("loose")
    for number in range(32):
        torch.manual_seed(number)
        pixels = torch.randint(256, (80, 90, 3), dtype=torch.uint8).numpy()
        Image.fromarray(pixels).save(loose / f"{number}.png")
    for number in range(2):
        with tarfile.open(root / f"train-{number}.tar", "w") as archive:
            for path in sorted(loose.iterdir())[number::2]:
                archive.add(path, path.name)
    return root


def test_a_node_that_differs_is_named(pictures: Path, tmp_path: Path) -> None:
    root = tmp_path / "shards"
    shutil.copytree(pictures, root)
    generator = torch.Generator().manual_seed(0)
    for name in ("one", "two"):  # of one size, with one header
        save_file({"w": torch.rand(1000, generator=generator)}, tmp_path / f"{name}.safetensors")
    weights = [tmp_path / f"{name}.safetensors" for name in ("one", "two")]
    run_ranks(PROGRAM, tmp_path, root, *weights, ranks=2, results=tmp_path)
    first, second = read_results(tmp_path, 2)

    assert first["alike"] is second["alike"] is None
    for name, words in {
        "code": (
            "LaunchError: nodes: different code",
            "hash 01234567 on n2, expected",
            "as on n1.",
        ),
        "versions": (
            "different versions of torch; got 1.2.3 on n2 (and different deepspeed, ",
            "as on n1",
        ),
        "weights": ("WeightsError: --teacher.source: the nodes see different weights", " on n2, "),
        "gone": ("WeightsError: n2: ", "one.safetensorsx: no such file"),
        "pictures": ("DataError: data.root: ", "got 16 images", " on n2, expected 32 images"),
        "together": ("DataError: n2: data.root: no such folder",),
    }.items():
        assert first[name] == second[name], name
        for word in words:
            assert word in first[name], (name, first[name])


def test_a_run_goes_on_with_a_copy_of_its_images(pictures: Path, tmp_path: Path) -> None:
    run_dir = tmp_path / "run"
    words = ("--optim.max_steps", "4", "--runtime.save_every", "2")
    train(pictures, run_dir, *words, ranks=1)
    whole = losses(run_dir)
    shutil.rmtree(run_dir / "checkpoints/step_00000004")
    (run_dir / "summary.json").unlink()
    copy = shutil.copytree(pictures, tmp_path / "copy")
    resumed = train(copy, run_dir, *words, ranks=1)
    assert "resumed after step 2" in resumed.outputs[0]
    assert losses(run_dir) == whole


def test_the_doctor_has_ranks_meet_and_names_the_node_that_lacks_something(tmp_path: Path) -> None:
    program = ROOT / "tests/integration/programs/doctor.py"
    env = {"GLOO_SOCKET_IFNAME": "lo"}
    finished = run_ranks(program, tmp_path, ranks=2, check=False, env=env)
    assert finished.returncodes == [1, 1]
    table, silent = finished.outputs
    assert silent == ""
    said = " ".join(table.split())  # Lines break where the paths of the tests have them break.
    assert "2 ranks on 2 nodes met" in said
    assert "; n2: GLOO_SOCKET_IFNAME=lo, NCCL_P2P_DISABLE=1" in said
    assert "n2: /proc/runs (proc)" in said
    assert table.splitlines()[-1] == "Training cannot start: run folder."
