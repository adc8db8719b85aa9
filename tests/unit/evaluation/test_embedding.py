"""Tables of features: their rows, their formats, and what an earlier start left."""

from __future__ import annotations

import csv
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import tiny_runs
import torch
from pictures import write_pictures

import fd_large
from fd_large.backbones.feature_map import FeatureMap
from fd_large.cli.main import main
from fd_large.engine.zero.partition import running_statistics
from fd_large.evaluation import embedding

MODEL = "timm:test_vit=random"


@pytest.fixture
def images(tmp_path):
    """Nine images, one of them in a folder."""
    folder = write_pictures(tmp_path / "images", 9, size=40)
    (folder / "b").mkdir()
    (folder / "004.png").rename(folder / "b" / "x,y.png")
    return folder


def embed(images: Path, out: Path, *words: str, model: str = MODEL) -> int:
    common = ["--data.root", str(images), "--data.image_size", "32", "--data.workers", "0"]
    return main(["embed", model, *common, "--out", str(out), "--batch_size", "2", *words])


NAMES = [*(f"00{number}.png" for number in (0, 1, 2, 3, 5, 6, 7, 8)), "b/x,y.png"]


def test_all_formats_hold_the_same_rows(images, tmp_path, monkeypatch, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr(embedding, "CHUNK", 4)
    for suffix in ("npz", "csv", "parquet"):
        assert embed(images, tmp_path / f"out.{suffix}") == 0
        assert "9 rows" in capsys.readouterr().out
    assert embed(images, tmp_path / "maps.npz", "--pool", "map") == 0
    with np.load(tmp_path / "out.npz") as kept:
        names, rows = kept["names"].tolist(), kept["features"]
    assert names == NAMES
    assert (rows.dtype, rows.shape) == (np.float32, (9, 64))
    header, *lines = csv.reader((tmp_path / "out.csv").open(newline=""))
    assert header[:2] == ["name", "f0"]
    assert [line[0] for line in lines] == names
    assert (np.array([line[1:] for line in lines], np.float32) == rows).all()
    table = parquet.read_table(tmp_path / "out.parquet")
    assert table["name"].to_pylist() == names
    assert (np.array(table["features"].to_pylist(), np.float32) == rows).all()
    with np.load(tmp_path / "maps.npz") as kept:
        assert kept["features"].shape == (9, 2, 2, 64)
        assert np.allclose(kept["features"].mean((1, 2)), rows, atol=1e-5)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "images", "maps.npz", "out.csv", "out.npz", "out.parquet"
    ]  # fmt: skip


def test_the_heads_of_a_run(images, tmp_path):
    run = tiny_runs.several_teachers(tiny_runs.tiny_run())
    task = tiny_runs.tiny_task(run)
    tiny_runs.store_task(tmp_path / "run", run, task, others=running_statistics(task))
    out = tmp_path / "out.npz"
    assert embed(images, out, "--features", "plain", model=str(tmp_path / "run")) == 0
    model = fd_large.load_student(tmp_path / "run")
    with np.load(out) as kept, torch.no_grad():
        for name, row in zip(kept["names"], kept["features"], strict=True):
            # `preprocess` cuts the same crop.
            maps = model.teacher_map("plain", model.preprocess(images / str(name))[None])
            assert np.allclose(row, maps.mean((0, 2, 3)), atol=1e-5)


def test_parts_of_other_settings_are_refused_and_of_the_same_are_used(
    images, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(embedding, "CHUNK", 4)
    extract, seen = embedding.extract, []

    def stops_at_the_second(*args, **options):
        seen.append(args)
        if len(seen) == 2:
            raise KeyboardInterrupt
        return extract(*args, **options)

    monkeypatch.setattr(embedding, "extract", stops_at_the_second)
    out = tmp_path / "out.csv"
    assert embed(images, out) == 75
    assert "Start the same command again" in capsys.readouterr().err
    assert embed(images, out, "--pool", "cls") == 2
    assert "pool" in capsys.readouterr().err
    assert embed(images, out) == 0
    assert len(seen) == 4
    whole = out.read_text()
    assert embed(images, out) == 2
    assert out.read_text() == whole
    out.unlink()
    assert embed(images, out) == 0
    assert out.read_text() == whole


def test_a_start_that_was_refused_leaves_nothing_that_refuses_its_remedy(images, tmp_path, capsys):
    out, model = tmp_path / "out.csv", "timm:test_resnet=random"
    assert embed(images, out, "--pool", "cls", model=model) == 2
    assert "Set --pool mean" in capsys.readouterr().err
    assert embed(images, out, "--pool", "mean", model=model) == 0


def test_names_that_are_not_utf_8(images, tmp_path):
    parquet = pytest.importorskip("pyarrow.parquet")
    (images / "000.png").rename(os.fsdecode(os.fsencode(images) + b"/\xff.png"))
    for suffix in ("parquet", "csv", "npz"):
        assert embed(images, tmp_path / f"out.{suffix}") == 0
    table = parquet.read_table(tmp_path / "out.parquet")
    assert r"\xff.png" in table["name"].to_pylist()


def test_images_that_cannot_be_read_are_left_out_and_many_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(
        embedding, "extract", with_model(embedding.extract, lambda x: x.mean((2, 3))[:, None])
    )
    images = write_pictures(tmp_path / "images", 100, size=16)
    (images / "050.png").write_bytes(b"no image")
    assert embed(images, tmp_path / "out.npz") == 0
    with np.load(tmp_path / "out.npz") as kept:
        assert len(kept["names"]) == 99
        assert "050.png" not in kept["names"]
    (images / "051.png").write_bytes(b"nor this")
    assert embed(images, tmp_path / "more.npz") == 2
    assert not (tmp_path / "more.npz").exists()


def with_model(extract, tokens):
    """`extract` by a model that takes no time."""

    def extracted(model, *args, **options):
        return extract(lambda pixels: FeatureMap(tokens(pixels), (1, 1), 0), *args, **options)

    return extracted


@pytest.mark.parametrize(
    ("out", "words"),
    [
        ("out.txt", ()),
        ("out", ()),
        ("out.csv", ("--pool", "map")),
        ("out.npz", ("--batch_size", "0")),
    ],
)
def test_what_cannot_be_written_is_refused_first(images, tmp_path, out, words, capsys):
    assert embed(images, tmp_path / out, *words) == 2
    assert ("--batch_size" if "batch" in str(words) else "--out") in capsys.readouterr().err
    shutil.rmtree(images)
    assert embed(images, tmp_path / "out.csv") == 2
    assert "data.root" in capsys.readouterr().err
