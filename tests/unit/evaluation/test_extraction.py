"""Features of images in temporary files: their progress, and what is left of them."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import torch
from labelled_folder import labelled_folder, noise

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.statistics import IMAGENET
from fd_large.data.labelled import open_labelled
from fd_large.evaluation.extraction import extracted
from fd_large.ranks import activity
from fd_large.recipes.sections import Data


def means(pixels: torch.Tensor) -> FeatureMap:
    return FeatureMap(pixels.mean((2, 3))[:, None], (1, 1), 0)


def test_files_last_as_long_as_the_block(tmp_path, monkeypatch):
    begun = []
    work = activity.work
    monkeypatch.setattr(
        activity, "work", lambda *words, **named: begun.append(words[0]) or work(*words, **named)
    )
    labelled_folder(
        tmp_path, train=5, val=0, classes=2, pixels=lambda draw, label: noise(draw, 24, 24)
    )
    images = open_labelled(str(tmp_path / "train"))
    folder = tmp_path / "out" / "features"
    with extracted(
        means, IMAGENET, images, folder, image_size=16, words="a model: images",
        flags=SimpleNamespace(batch_size=2), data=Data(workers=0), pools=("mean", "map"),
    ) as (mean, patches):  # fmt: skip
        assert {path.name for path in folder.iterdir()} == {"rows.npy", "labels.npy"}
        assert mean.labels.tolist() == images.labels.tolist()
        assert np.array_equal(mean.rows, patches.rows)
        assert mean.rows.shape == (5, 3)
    assert "a model: images" in begun
    assert list((tmp_path / "out").iterdir()) == []
