"""Features in files: pooling, order, images that cannot be used."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from labelled_folder import labelled_folder, noise
from PIL import Image

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.registry import build
from fd_large.backbones.statistics import OPENAI_CLIP, normalise
from fd_large.data.centre_crops import NO_LABEL, central_view
from fd_large.data.labelled import LabelledImages, open_labelled
from fd_large.errors import ConfigError, DataError
from fd_large.probes.features import extract, pooled
from fd_large.recipes.architectures import Architecture

SIZE = 32


def write(root: Path, count: int) -> LabelledImages:
    labelled_folder(
        root, train=count, val=0, classes=3, pixels=lambda draw, label: noise(draw, 40, 44)
    )
    return open_labelled(str(root / "train"))


def test_rows_are_the_nets_means_in_the_pictures_order(tmp_path):
    pictures = write(tmp_path / "pictures", 11)
    shape = Architecture(embed_dim=16, depths=(1,), num_heads=(2,), patch_size=8, image_size=SIZE)
    net = build("vit_base_patch16", shape, seed=1).eval()
    told: list[int] = []
    both, found, class_tokens = extract(
        net, OPENAI_CLIP, pictures, tmp_path / "out", image_size=SIZE, batch_size=4,
        pools=("both", "mean", "cls"), progress=told.append,
    )  # fmt: skip
    assert told == [4, 4, 3]
    assert isinstance(found.rows, np.memmap)
    for index in range(11):
        image = torch.from_numpy(np.array(Image.open(pictures[index]))).permute(2, 0, 1)
        with torch.no_grad():
            tokens = net(normalise(central_view(image, SIZE)[None], OPENAI_CLIP)).tokens
        assert np.allclose(found.rows[index], tokens[0, 1:].mean(0), atol=1e-5)
        assert np.allclose(class_tokens.rows[index], tokens[0, 0], atol=1e-5)
        assert (both.rows[index] == [*found.rows[index], *class_tokens.rows[index]]).all()
        assert found.labels[index] == pictures.label(index)


def test_pools():
    tokens = torch.arange(24.0).view(1, 6, 4)
    features = FeatureMap(tokens, (2, 2), 2)
    assert torch.equal(pooled(features, "mean"), tokens[:, 2:].mean(1))
    assert torch.equal(pooled(features, "cls"), tokens[:, 0])
    both = torch.cat([tokens[:, 2:].mean(1), tokens[:, 0]], 1)
    assert torch.equal(pooled(features, "both"), both)
    with pytest.raises(ConfigError, match=r"^--pool: .*got cls"):
        pooled(FeatureMap(tokens, (2, 3), 0), "cls")
    # A class token that stands beside the map.
    beside = FeatureMap(tokens, (2, 3), 0, tokens[:, :1] + 1)
    assert torch.equal(pooled(beside, "cls"), tokens[:, 0] + 1)
    assert torch.equal(pooled(beside, "mean"), tokens.mean(1))


def net_of_means(pixels: torch.Tensor) -> FeatureMap:
    return FeatureMap(pixels.mean((2, 3))[:, None], (1, 1), 0)


def test_a_bad_picture_is_left_out_and_many_are_refused(tmp_path):
    pictures = write(tmp_path / "pictures", 120)
    broken = Path(pictures[7])
    broken.write_bytes(b"no image")
    again = open_labelled(pictures.images.root)
    arguments = {"image_size": SIZE, "batch_size": 50}
    (found,) = extract(net_of_means, OPENAI_CLIP, again, tmp_path / "out", **arguments)
    assert found.labels[7] == NO_LABEL
    assert len(found.usable()) == 119
    Path(pictures[8]).write_bytes(b"nor this")
    with pytest.raises(DataError, match="got 2 of 120"):
        extract(net_of_means, OPENAI_CLIP, again, tmp_path / "out", **arguments)


def test_a_disk_without_room_is_told_before_anything_is_computed(tmp_path, monkeypatch):
    pictures = write(tmp_path / "pictures", 12)

    def full(number: int, start: int, size: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.posix_fallocate", full)
    with pytest.raises(ConfigError, match="of 12 images"):
        extract(
            net_of_means, OPENAI_CLIP, pictures, tmp_path / "out", image_size=SIZE, batch_size=5
        )
