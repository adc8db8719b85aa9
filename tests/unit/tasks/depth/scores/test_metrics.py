from __future__ import annotations

import numpy as np
import pytest

from fd_large.errors import ConfigError
from fd_large.tasks.depth.scores.metrics import NAMES, Scored, Scores, finite_depths, image_scores


def by_hand(predicted: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The formulas pixel by pixel."""
    pairs = list(zip(predicted.tolist(), truth.tolist(), strict=True))
    count = len(pairs)
    logs = [np.log(p) - np.log(t) for p, t in pairs]
    within = [max(p / t, t / p) for p, t in pairs]
    mean_log = sum(logs) / count
    mean_square = sum(e * e for e in logs) / count
    return {
        "d1": sum(r < 1.25 for r in within) / count,
        "d2": sum(r < 1.25**2 for r in within) / count,
        "d3": sum(r < 1.25**3 for r in within) / count,
        "abs_rel": sum(abs(p - t) / t for p, t in pairs) / count,
        "sq_rel": sum((p - t) ** 2 / t for p, t in pairs) / count,
        "rmse": (sum((p - t) ** 2 for p, t in pairs) / count) ** 0.5,
        "rmse_log": mean_square**0.5,
        "log10": sum(abs(np.log10(p) - np.log10(t)) for p, t in pairs) / count,
        "silog": (mean_square - 0.5 * mean_log**2) ** 0.5,
    }


def test_scores_are_the_formulas():
    draw = np.random.default_rng(0)
    truth = draw.uniform(0.5, 9, 50)
    predicted = truth * draw.uniform(0.6, 1.7, 50)
    predicted[0] = 1.25 * truth[0]
    found = dict(zip(NAMES, image_scores(predicted, truth), strict=True))
    assert found == pytest.approx(by_hand(predicted, truth), rel=1e-12)


def test_limits_are_strict_and_in_the_file_s_precision():
    truth = np.array([[0, 1, 2, 9999, 10000, 10001]], np.float32) / np.float32(1000)
    assert Scored((0.001, 10.0)).pixels(truth).tolist() == [
        [False, False, True, True, False, False]
    ]


@pytest.mark.parametrize(
    ("crop", "size", "rows", "columns"),
    [
        ("none", (5, 6), (0, 5), (0, 6)),
        ("nyu", (480, 640), (45, 471), (41, 601)),
        ("kitti_garg", (352, 1216), (143, 349), (43, 1172)),
        ("kitti_eigen", (352, 1216), (117, 321), (43, 1172)),
    ],
)
def test_the_part_that_is_scored(crop, size, rows, columns):
    inside = Scored((0.1, 10.0), crop).pixels(np.ones(size))
    assert inside.sum() == (rows[1] - rows[0]) * (columns[1] - columns[0])
    assert inside[slice(*rows), slice(*columns)].all()


def test_the_crop_of_nyuv2_is_of_images_of_its_size():
    with pytest.raises(
        ConfigError, match=r"test_crop: nyu .*240 x 320.*--task\.depth\.test_crop none"
    ):
        Scored((0.1, 10.0), "nyu").pixels(np.ones((240, 320)))


def test_depths_that_are_no_numbers_are_limits():
    found = finite_depths(
        np.array([np.nan, np.inf, -np.inf, 20.0, -1.0], np.float32), (0.001, 10.0)
    )
    assert found.tolist() == [0.001, 10.0, 10.0, 20.0, -1.0]


def test_means_are_over_scored_images():
    of_images = np.array([[1.0] * 9, [np.nan] * 9, [3.0] * 9])
    assert set(Scores(of_images, np.array([5, 0, 1])).numbers().values()) == {2.0}
    assert np.isnan(list(Scores(of_images[1:2], np.array([0])).numbers().values())).all()
