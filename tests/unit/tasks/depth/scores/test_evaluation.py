from __future__ import annotations

import io
import json
from collections import Counter

import numpy as np
import pretended_ranks
import pytest
import torch
from depth_images import write_images
from PIL import Image
from rich.console import Console

from fd_large.probes.redrawn import read
from fd_large.tasks.dense.evaluation import predict_some
from fd_large.tasks.depth.data.dataset import open_depth
from fd_large.tasks.depth.data.views import TestViews
from fd_large.tasks.depth.scores.evaluation import Model, evaluate, keep
from fd_large.tasks.depth.scores.metrics import NAMES
from fd_large.tasks.depth.scores.tables import numbers_table

SETTING = {"limits": (0.001, 10.0), "crop": "none", "workers": 0}
VIEWS = TestViews(72, 2, True)


def by_brightness(images: torch.Tensor) -> torch.Tensor:
    """The depth that the made images were painted by: a model that needs no training."""
    return ((260 - images.float().mean(1) / 0.8667) / 45).clamp(min=0.5)


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = write_images(tmp_path_factory.mktemp("nyu"), 5)
    # A test image without a depth, and one that cannot be read.
    test = root / "official_splits/test"
    (test / "kitchen/rgb_00002.jpg").write_bytes(b"broken")
    Image.fromarray(np.zeros((72, 96), np.uint16)).save(test / "kitchen/sync_depth_00004.png")
    return open_depth(str(root), "val")


@pytest.mark.parametrize("views", [TestViews(72), VIEWS, TestViews(36, 5)], ids=str)
def test_any_number_of_ranks_gives_the_same_bits_and_makes_as_many_forwards(
    images, views, monkeypatch
):
    forwards: Counter[int] = Counter()

    def counted(pixels: torch.Tensor) -> torch.Tensor:
        forwards[pretended_ranks.rank()] += 1
        return by_brightness(pixels)

    model = Model(counted, views, 2)
    alone = evaluate(model, images, **SETTING)
    assert alone.scores.numbers()["d1"] > 0.95
    assert (alone.unread, alone.without_depth) == (1, 1)
    for ranks in (2, 3):
        forwards.clear()
        world = pretended_ranks.World(monkeypatch, ranks)
        for outcome in world.run(lambda: evaluate(model, images, **SETTING)):
            assert np.array_equal(outcome.scores.of_images, alone.scores.of_images, equal_nan=True)
            assert outcome.scores.numbers() == alone.scores.numbers()
            assert (outcome.unread, outcome.without_depth) == (1, 1)
        assert len(set(forwards.values())) == 1


def test_scores_and_pictures_are_kept(images, tmp_path):
    model = Model(by_brightness, VIEWS)
    outcome = evaluate(model, images, **SETTING)
    drawn = keep(outcome, predict_some(outcome.errors, model, images), images, tmp_path)
    assert [path.name for path in drawn] == ["worst.png", "chosen.png"]
    assert all(path.stat().st_size > 5000 for path in drawn)
    scores = json.loads((tmp_path / "scores.json").read_text())
    assert {name: scores[name] for name in NAMES} == outcome.scores.numbers()
    assert (scores["crop"], scores["images"], scores["unread_images"]) == ("none", 3, 1)
    assert len(scores["of_images"]) == 3
    rmse = read(tmp_path, "val_rmse")
    assert rmse.score == scores["rmse"]
    of_images = outcome.errors[~np.isnan(outcome.errors)]
    assert of_images.min() <= rmse.draws.min() < rmse.draws.max() <= of_images.max()
    console = Console(width=120, file=io.StringIO())
    console.print(numbers_table(outcome))
    text = console.file.getvalue()
    assert "3 images, crop none" in text
    assert "2 left out" in text


def test_squares_are_averaged_and_the_rest_is_seen_too():
    pixels = torch.rand(1, 3, 8, 23)

    def depths(crops: torch.Tensor) -> torch.Tensor:
        return crops.mean(1) + torch.arange(crops.shape[-1]) ** 2

    model = Model(depths, TestViews(8, 4, True), 3)
    whole, squares = model.of_view(pixels)[0], model.of_squares(pixels)[0]
    total, count = torch.zeros(8, 23), torch.zeros(8, 23)
    for left in (0, 5, 10, 15):
        crop = pixels[..., left : left + 8]
        total[:, left : left + 8] += (depths(crop) + depths(crop.flip(-1)).flip(-1))[0] / 2
        count[:, left : left + 8] += 1
    torch.testing.assert_close(squares, total / count)
    assert torch.equal(whole, squares)
    pixels = torch.rand(1, 3, 8, 25)
    whole, squares = model.of_view(pixels)[0], model.of_squares(pixels)[0]
    assert squares[:, 23:].isnan().all()
    assert torch.equal(whole[:, :23], squares[:, :23])
    last = pixels[..., 17:]
    torch.testing.assert_close(
        whole[:, 23:], (depths(last) + depths(last.flip(-1)).flip(-1))[0, :, 6:] / 2
    )


def test_a_depth_has_the_size_of_its_image(images):
    image, depths = images.sample(0)
    model = Model(by_brightness, TestViews(36))
    seen = [view.image(image) for view in model.views.views(72, 96)]
    predicted = model.predict(seen, (72, 96))
    assert predicted.shape == depths.shape
    known = torch.from_numpy(depths > 0)
    assert (predicted - torch.from_numpy(depths))[known].abs().median() < 0.15
