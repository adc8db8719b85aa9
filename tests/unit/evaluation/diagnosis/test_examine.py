"""The whole command on tiny models: numbers, images and the page."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path

import numpy
import pytest
import torch
from PIL import Image

from fd_large.backbones.statistics import OPENAI_CLIP, normalise
from fd_large.backbones.token_positions import TokenPositions
from fd_large.cli import main as cli
from fd_large.evaluation.diagnosis import examine
from fd_large.evaluation.diagnosis.attention_maps import maps_to
from fd_large.evaluation.diagnosis.attention_measures import prefix_share
from fd_large.evaluation.diagnosis.examine import Extent
from fd_large.evaluation.diagnosis.models import load_model
from fd_large.evaluation.diagnosis.sample import Sample
from fd_large.report.diagnosis_page import SENTENCES

ROOT = "builtin:photographs"


@pytest.fixture(autouse=True)
def few_points(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(examine, "Extent", partial(Extent, points=11, seeds=2, side=3))


def run(out: Path, *words: str) -> dict:
    assert cli.main(["diagnose", *words, "--data.root", ROOT, "--out", str(out)]) == 0
    return json.loads((out / "diagnosis.json").read_text())


@pytest.fixture
def found(distillation, vit_weights: Path, tmp_path: Path, capsys) -> tuple[Path, dict, str]:
    words = [str(distillation[0]), str(vit_weights), "--images", "9", "--batch_size", "5"]
    diagnosis = run(tmp_path / "out", *words)
    return tmp_path / "out", diagnosis, capsys.readouterr().out


def test_two_nets_side_by_side(found, distillation) -> None:
    folder, diagnosis, said = found
    student, vit = diagnosis["models"]
    assert (diagnosis["images"], diagnosis["root"]) == (9, ROOT)
    assert [model["label"] for model in diagnosis["models"]] == ["tiny", "vit"]

    layers = student["attention"]
    assert [layer["layer"] for layer in layers] == [
        f"layers.{stage}.blocks.{block}.attn" for stage in range(2) for block in range(2)
    ]
    assert [layer["heads"] for layer in layers] == [2, 2, 4, 4]
    assert [layer["pixels_per_token"] for layer in layers] == [4, 4, 8, 8]
    # No two tokens of a window of 2 x 2 are further apart than its diagonal.
    assert all(0 < d <= 4 * 2**0.5 for layer in layers[:2] for d in layer["distance_pixels"])
    assert all(layer["prefix_share"] == [0] * layer["heads"] for layer in layers)
    assert all(0 < share < 1 for layer in vit["attention"] for share in layer["prefix_share"])
    for model in diagnosis["models"]:
        for layer in model["attention"]:
            assert 0 < layer["head_similarity"] <= 1
            assert layer["translation_score"] <= 1

    # The landscapes see every batch: at zero, the loss of the task itself, to the bit.
    objective, drift = student["landscapes"]
    task, batches = distillation[2], list(Sample(ROOT, 9).batches(2, [32]))
    with torch.no_grad():
        expected = [
            task(**task.prepare(batch.of_size[32], None, None))[0].item() for batch in batches
        ]
    zero = objective["steps"].index(0)
    assert objective["images"] == [5, 4]
    assert objective["value"] == expected
    for along in objective["curves"]:
        assert [of_batch[zero] for of_batch in along] == expected
    assert objective["map"][1][1] == expected[0]
    assert len({tuple(along[0]) for along in objective["curves"]}) == 2
    (of_vit,) = vit["landscapes"]
    assert of_vit["comparable"] == drift["comparable"] != objective["comparable"]
    assert of_vit["value"] == drift["value"] == [0, 0]
    # Each stands beside its random weights.
    for model in diagnosis["models"]:
        assert [layer["layer"] for layer in model["scratch"]] == [
            layer["layer"] for layer in model["attention"]
        ]
        assert model["scratch"] != model["attention"]

    names, matrix = diagnosis["cka"]["layers"], numpy.array(diagnosis["cka"]["matrix"])
    assert names[1] == ["blocks.0", "blocks.1", "map"]
    assert matrix.shape == (8, 8)
    numpy.testing.assert_allclose(numpy.diagonal(matrix), 1)

    pictures = {path.stem for path in folder.glob("*.png")}
    assert pictures == set(SENTENCES)
    page = (folder / "index.md").read_text()
    for name, (heading, text) in SENTENCES.items():
        assert f"![{heading}]({name}.png)" in page
        assert text in page
        with Image.open(folder / f"{name}.png") as picture:
            assert min(picture.size) > 200
    assert "attention distance" in said
    assert "no run with relative positions that was trained on labels" in " ".join(said.split())
    assert "tiny" in said


def test_figures_do_not_depend_on_the_batches(vit_weights: Path, tmp_path: Path) -> None:
    def attention(batch_size: str) -> list[dict]:
        out = tmp_path / batch_size
        words = [str(vit_weights), "--images", "9", "--batch_size", batch_size]
        return run(out, *words)["models"][0]["attention"]

    for one, other in zip(attention("9"), attention("4"), strict=True):
        for name in ("distance_pixels", "prefix_share", "head_similarity", "translation_score"):
            numpy.testing.assert_allclose(one[name], other[name], rtol=1e-4, atol=1e-5)


def test_each_net_sees_images_by_its_own_statistics(found, vit_weights: Path) -> None:
    _, diagnosis, _ = found
    sample = Sample(ROOT, 9)
    loaded = load_model(str(vit_weights), sample)
    shares = []

    def note(name: str, attention: torch.Tensor, positions: TokenPositions) -> None:
        shares.append(prefix_share(attention, positions))

    for views in sample.batches(1, [32]):
        with torch.no_grad(), maps_to(note, loaded.backbone, (4, 4)):
            loaded.backbone(normalise(views.of_size[32], OPENAI_CLIP))
    for share, layer in zip(shares, diagnosis["models"][1]["attention"], strict=True):
        numpy.testing.assert_allclose(layer["prefix_share"], share.mean(0), rtol=1e-4)


def test_a_convolutional_net_has_landscape_and_cka_alone(tmp_path: Path) -> None:
    diagnosis = run(tmp_path / "out", "timm:test_efficientnet=random", "--images", "4")
    (model,) = diagnosis["models"]
    assert model["attention"] == []
    assert model["landscapes"][0]["value"] == [0]
    pictures = {path.stem for path in (tmp_path / "out").glob("*.png")}
    assert pictures == {"landscape", "landscape_map", "cka"}


def test_mistakes_are_told_in_one_sentence(tmp_path: Path, capsys) -> None:
    assert cli.main(["diagnose", "--data.root", ROOT]) == 2
    assert "MODEL" in capsys.readouterr().err
    assert cli.main(["diagnose", "x", "--data.root", ROOT, "--images", "0"]) == 2
    assert "images:" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    model = "timm:test_efficientnet=random"
    words = ["diagnose", model, "--data.root", ROOT, "--out", str(tmp_path / "file")]
    assert cli.main(words) == 2
    assert "--out" in capsys.readouterr().err
