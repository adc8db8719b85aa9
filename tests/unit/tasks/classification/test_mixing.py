"""Mixup and CutMix against timm's, and who is mixed with whom."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from timm.data.mixup import Mixup

from fd_large.tasks.classification import mixing
from fd_large.tasks.classification.mixing import Mix

SIZE, CLASSES, PUBLISHED = 24, 7, {"mixup": 0.8, "cutmix": 1.0, "switch_probability": 0.5}


def mix_of(first: int, **changed: float) -> Mix:
    settings = {**PUBLISHED, **changed}
    return mixing.draw_mix(3, 1, first, image_size=SIZE, **settings)


def batch() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, 3, SIZE, SIZE, generator=generator)
    return images, torch.randint(0, CLASSES, (6,), generator=generator)


@pytest.mark.parametrize("mix", [mix_of(0), mix_of(6), mix_of(12), mix_of(18), mix_of(24)])
def test_a_batch_is_mixed_as_timm_mixes_it(mix, monkeypatch):
    images, labels = batch()
    # timm's partners are those of a batch read backwards: 0 and 5, 1 and 4, 2 and 3.
    backwards = [5, 4, 3, 2, 1, 0]
    timm = Mixup(0.8, 1.0, mode="batch", label_smoothing=0.1, num_classes=CLASSES)
    share = mix.share
    if mix.box is not None:
        box = mix.box
        monkeypatch.setattr("timm.data.mixup.cutmix_bbox_and_lam", lambda *a, **k: (box, share))
    monkeypatch.setattr(timm, "_params_per_batch", lambda: (share, mix.box is not None))
    expected, targets = timm(images.clone(), labels)
    found = mixing.mix_images(images, images[backwards], mix)
    assert torch.allclose(found, expected, atol=1e-6)
    ours = mixing.mix_labels(labels, labels[backwards], mix, num_classes=CLASSES, smoothing=0.1)
    assert torch.allclose(ours, targets, atol=1e-6)
    assert torch.allclose(ours.sum(1), torch.ones(6))


def test_both_kinds_come_up_and_boxes_carry_their_share():
    mixes = [mix_of(first) for first in range(400)]
    cut = [mix for mix in mixes if mix.box is not None]
    assert 0.4 < len(cut) / len(mixes) < 0.6
    for mix in cut:
        top, bottom, left, right = mix.box
        assert 0 <= top <= bottom <= SIZE
        assert 0 <= left <= right <= SIZE
        area = (bottom - top) * (right - left) / SIZE**2
        assert mix.share == pytest.approx(1 - area)
    assert all(mix_of(first, cutmix=0.0).box is None for first in range(20))
    assert all(mix_of(first, mixup=0.0).box is not None for first in range(20))
    assert mix_of(5, mixup=0.0, cutmix=0.0) == mixing.UNMIXED


def test_a_box_is_timms_of_the_same_middle_and_share(monkeypatch):
    mix = next(mix for first in range(50) if (mix := mix_of(first)).box is not None)
    first = next(first for first in range(50) if mix_of(first) == mix)
    _, top, left, *pairs = mixing.uniforms(3, 1, [first], "mixing", 3 + 2 * mixing.SHARE_TRIES)[0]
    middles = iter([int(top * SIZE), int(left * SIZE)])
    monkeypatch.setattr("timm.data.mixup.np.random.randint", lambda *a, **k: next(middles))
    from timm.data.mixup import cutmix_bbox_and_lam

    share = mixing.beta_share(np.array(pairs), 1.0)
    box, corrected = cutmix_bbox_and_lam((3, SIZE, SIZE), share)
    assert tuple(map(int, box)) == mix.box
    assert corrected == pytest.approx(mix.share)


@pytest.mark.parametrize("alpha", [0.2, 0.8, 1.0, 2.0])
def test_shares_have_the_beta_distribution(alpha):
    rng = np.random.default_rng(0)
    found = [mixing.beta_share(rng.random(2 * mixing.SHARE_TRIES), alpha) for _ in range(4000)]
    expected = rng.beta(alpha, alpha, 100_000)
    quantiles = np.linspace(0.1, 0.9, 9)
    assert np.abs(np.quantile(found, quantiles) - np.quantile(expected, quantiles)).max() < 0.04
