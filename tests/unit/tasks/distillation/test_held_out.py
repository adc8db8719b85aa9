"""Held-out losses on fixed views, and the constant-prediction baseline."""

from __future__ import annotations

from types import SimpleNamespace

import numpy as np
import pytest
import tiny_runs
import torch
from PIL import Image
from torch import nn

from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.swinv2.swinv2 import SwinV2
from fd_large.data.source import open_images
from fd_large.data.views import ViewSettings
from fd_large.engine.evaluation import Interrupted
from fd_large.errors import DataError
from fd_large.ranks import distributed
from fd_large.tasks.distillation.held_out import Crops, HeldOutViews, constant_prediction_losses
from fd_large.tasks.distillation.objective import make_target
from fd_large.tasks.distillation.target import references
from fd_large.tasks.distillation.task import Distillation

SETTINGS = ViewSettings(32, 0.5, 10**7, 0.0, 0.0)


@pytest.fixture(scope="module")
def task():
    return tiny_runs.tiny_task(tiny_runs.tiny_run())


@pytest.fixture
def engine(task):
    return SimpleNamespace(task=task.train(), deepspeed=task)


@pytest.fixture
def images(tmp_path):
    generator = np.random.default_rng(0)
    for number in range(7):
        levels = generator.integers(0, 256, (48, 40, 3), dtype=np.uint8)
        Image.fromarray(levels).save(tmp_path / f"{number}.png")
    return tmp_path


def views_of(folder, views=5, micro=2, **more):
    crops = Crops(open_images(str(folder)), views, SETTINGS, seed=3, **more)
    return HeldOutViews("set", crops, micro_batch_size=micro)


def measured(views, engine, calls=None):
    def between():
        assert not engine.task.training
        assert not torch.is_grad_enabled()
        if calls is not None:
            calls.append(1)

    found = views.measure(engine, between)
    assert engine.task.training
    return found


def test_a_mean_over_views_whatever_the_micro_batch(images, engine):
    calls = []
    found = measured(views_of(images), engine, calls)
    assert found.keys() == {"set_loss", "set_cosine"}
    assert len(calls) == 3
    for micro in (1, 5, 9):
        assert measured(views_of(images, micro=micro), engine) == pytest.approx(found, rel=1e-5)
    engine.task.eval()
    with torch.no_grad():
        prepared = engine.task.prepare(views_of(images)._images, None, None)
        assert found["set_loss"] == pytest.approx(engine.task(**prepared)[0].item(), rel=1e-5)


@pytest.mark.parametrize(("views", "micro", "world"), [(5, 2, 2), (5, 1, 3), (2, 4, 4)])
def test_ranks_share_the_views(images, engine, monkeypatch, views, micro, world):
    """Ranks without views run as many forwards, which count for nothing."""
    alone = measured(views_of(images, views, micro), engine)
    monkeypatch.setattr(distributed, "world_size", lambda: world)
    sums, forwards, shares = [], [], []
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        own, calls = [], []
        monkeypatch.setattr(distributed, "sum_tensor", lambda t, own=own: own.append(t) or t)
        share = views_of(images, views, micro)
        measured(share, engine, calls)
        sums.append(own)
        forwards.append(len(calls))
        shares.append(share)
    counts, totals = (sum(own[i] for own in sums) for i in (0, 1))
    assert counts == views
    assert (totals / counts).tolist() == pytest.approx(list(alone.values()), rel=1e-5)
    assert len(set(forwards)) == 1
    # All show the same images.
    assert all(torch.equal(share._panel, shares[0]._panel) for share in shares)


def test_an_evaluation_that_is_left_goes_back_to_training(images, engine):
    def between():
        raise Interrupted

    with pytest.raises(Interrupted):
        views_of(images).measure(engine, between)
    assert engine.task.training
    assert torch.is_grad_enabled()


def test_a_bad_image_is_refused_or_replaced_by_the_next(images, caplog):
    whole = views_of(images, 7)._images
    (images / "3.png").write_bytes(b"no image")
    with pytest.raises(DataError, match=r"3\.png"):
        views_of(images, 7)
    mended = views_of(images, 7, skip_bad=True)._images
    assert "3.png" in caplog.text
    same = [torch.equal(a, b) for a, b in zip(whole, mended, strict=True)]
    assert same.count(False) == 1


def test_the_panel_shows_whitened_teacher_and_projected_student(images, engine):
    panel = views_of(images).panel(engine)
    assert panel["images"].shape == (4, 32, 32, 3)
    assert panel["teacher"].shape == panel["student"].shape == (4, 4, 4, 16)
    np.testing.assert_allclose(panel["teacher"].var(-1), np.ones((4, 4, 4)), atol=1e-2)
    assert engine.task.training


def test_the_panel_shows_views_that_vary(images, engine):
    for number in (0, 2, 5, 6):
        Image.new("RGB", (40, 48), (90, 120, 200)).save(images / f"{number}.png")
    shown = views_of(images, views=7).panel(engine)["images"]
    # There are three others.
    assert sum(image.std((0, 1)).max() > 0 for image in shown) == 3
    assert (views_of(images, views=7).panel(engine)["images"] == shown).all()


def test_the_panel_shows_each_of_a_few_images(tmp_path, engine):
    noise = np.random.default_rng(0).integers(0, 256, (48, 40, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "noise.png")
    Image.fromarray(noise // 64).save(tmp_path / "dark.png")
    panel = views_of(tmp_path, views=16).panel(engine)
    assert sorted(image.max() > 4 for image in panel["images"]) == [False, False, True, True]


def prepared(seed: int, channels: int = 6, *, long: float = 0.0) -> dict:
    """Skewed targets, whose mean is not the minimum; one token in 16 may be long, and elsewhere."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randn(2, 16, channels, generator=generator).exp() * 3
    tokens[:, 5] -= long
    return {
        "pixels": torch.zeros(2, 3, 32, 32),
        "keep": None,
        "maps": {"": FeatureMap(tokens, (4, 4), 0)},
    }


def task_of(loss: str, normaliser: str) -> Distillation:
    student = SwinV2(8, (1, 1), (1, 2), window_size=4)
    target = make_target(student.width, 6, loss=loss, normaliser=normaliser)
    return Distillation(student, {"": lambda images: None}, [target]).eval()


@pytest.mark.parametrize(
    ("loss", "normaliser", "long", "close"),
    [
        ("smooth_l1", "whitening", 0, 1e-3),
        ("cosine", "none", 0, 1e-5),
        ("cosine_of_map", "none", 0, 1e-5),
        ("l1", "whitening", 0, 1e-2),
        ("0.9 cosine + 0.1 smooth_l1", "none", 0, 1e-2),
        # The mean is further than beta from all tokens, and points away from most of them.
        ("smooth_l1", "none", 300, 1e-2),
        ("cosine", "none", 300, 1e-5),
        ("0.9 cosine_of_map + 0.1 smooth_l1", "none", 300, 2e-2),
    ],
)
def test_it_is_the_minimum_over_constants(loss, normaliser, long, close):
    task = task_of(loss, normaliser)
    batches = [
        (prepared(0, long=long), 1),
        (prepared(2, long=long), 0),
        (prepared(1, long=long), 1),
    ]
    (found,) = constant_prediction_losses(task, lambda: iter(batches), lambda t: t)
    target = torch.cat([references(task, **prepared(seed, long=long))[0] for seed in (0, 1)])
    mean = target.mean((0, 1))
    # The median is on the side of most tokens.
    starts = mean, target.flatten(0, 1).median(0).values
    assert found == pytest.approx(min(minimum(task, target, at) for at in starts), rel=close)
    # The mean alone is worse.
    assert found < task.targets[0].loss(mean.expand_as(target), target).item() * (1 - 1e-4)


def minimum(task: Distillation, target: torch.Tensor, start: torch.Tensor) -> float:
    """The least loss of a constant that L-BFGS finds."""
    constant = nn.Parameter(start.clone())
    optimizer = torch.optim.LBFGS([constant], max_iter=100, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = task.targets[0].loss(constant.expand_as(target), target)
        loss.backward()
        return loss

    optimizer.step(closure)
    return closure().item()
