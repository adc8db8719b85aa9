"""RandAugment and erasing against timm's own, and what they draw."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import auto_augment
from timm.data.random_erasing import RandomErasing

from fd_large.backbones.statistics import OPENAI_CLIP
from fd_large.tasks.classification import augment

PICTURE = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8).repeat(4, 0)
IMAGE = torch.from_numpy(PICTURE).permute(2, 0, 1).contiguous()
FILL = tuple(round(255 * value) for value in OPENAI_CLIP.mean)


def augmented(*draws: float, std: float = 0.5) -> np.ndarray:
    view = augment.augment(IMAGE, draws, magnitude=9, std=std, statistics=OPENAI_CLIP)
    assert view.dtype == torch.uint8
    assert view.is_contiguous()
    return view.permute(1, 2, 0).numpy()


def one(name: str, sign: float, first: float = 0.3, second: float = 0.9) -> tuple[float, ...]:
    """Draws that apply this operation alone."""
    which = (list(augment.OPERATIONS).index(name) + 0.5) / len(augment.OPERATIONS)
    return which, 0.1, first, second, sign, 0.0, 0.9, 0.0, 0.0, 0.0


def test_the_list_is_timms():
    assert list(augment.OPERATIONS) == auto_augment._RAND_INCREASING_TRANSFORMS


@pytest.mark.parametrize("sign", [0.2, 0.8])
@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_an_operation_is_timms_of_that_magnitude(name, sign, monkeypatch):
    first, second = 0.3, 0.9
    magnitude = 9 + 0.5 * math.sqrt(-2 * math.log(0.7)) * math.cos(2 * math.pi * second)
    assert magnitude < 10
    operation = auto_augment.AugmentOp(
        name,
        prob=1.0,
        magnitude=magnitude,
        hparams={"img_mean": FILL, "interpolation": Image.Resampling.BICUBIC},
    )
    # timm negates above one half.
    monkeypatch.setattr(auto_augment.random, "random", lambda: sign)
    expected = np.asarray(operation(Image.fromarray(PICTURE)))
    assert np.array_equal(augmented(*one(name, sign, first, second)), expected)


FAR = 1 - 2.0**-40  # More than seven deviations up.


@pytest.mark.parametrize("name", augment.OPERATIONS)
def test_every_operation_bears_the_largest_magnitude(name):
    for sign in (0.2, 0.8):
        assert augmented(*one(name, sign, FAR, 0.0)).shape == PICTURE.shape
    if name == "PosterizeIncreasing":
        assert not augmented(*one(name, 0.2, FAR, 0.0)).any()


def test_magnitudes_are_cut_at_ten():
    assert np.array_equal(
        augmented(*one("Rotate", 0.2, FAR, 0.0)), augmented(*one("Rotate", 0.2, FAR, 0.0), std=9.0)
    )


def test_half_of_the_operations_are_left_out():
    assert np.array_equal(augmented(0.5, 0.5, 0.1, 0.1, 0.1, 0.5, 0.5, 0.1, 0.1, 0.1), PICTURE)
    both = augmented(*one("Invert", 0.1)[:5], *one("Invert", 0.1)[:5])
    assert np.array_equal(both, PICTURE)


def test_normals_are_normal():
    draws = np.random.default_rng(1).random((2, 200_000))
    found = augment.normals(*draws)
    assert abs(found.mean()) < 0.01
    assert abs(found.std() - 1) < 0.01
    assert abs((found**4).mean() - 3) < 0.1


def test_boxes_are_distributed_as_timms():
    draws = np.random.default_rng(2).random((4000, augment.NUM_ERASING_DRAWS))
    boxes = [augment.erasing_box(40, 56, row, probability=0.25) for row in draws.tolist()]
    ours = np.array([box for box in boxes if box is not None], dtype=float)
    assert len(ours) / len(draws) == pytest.approx(0.25, abs=0.03)
    torch.manual_seed(0)
    erasing = RandomErasing(0.25, mode="pixel", device="cpu")
    theirs = []
    for _ in range(4000):
        changed = (erasing(torch.full((1, 40, 56), 99.0)) != 99.0)[0].numpy()
        if changed.any():
            rows, columns = np.flatnonzero(changed.any(1)), np.flatnonzero(changed.any(0))
            theirs.append((rows[0], columns[0], len(rows), len(columns)))
    expected = np.array(theirs, dtype=float)
    for column in range(4):
        assert ours[:, column].mean() == pytest.approx(expected[:, column].mean(), rel=0.12)
        assert ours[:, column].std() == pytest.approx(expected[:, column].std(), rel=0.15)
    bottoms, rights = ours[:, 0] + ours[:, 2], ours[:, 1] + ours[:, 3]
    assert bottoms.max() <= 40
    assert rights.max() <= 56
