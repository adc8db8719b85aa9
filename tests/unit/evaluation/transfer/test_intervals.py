"""Differences of rows with their intervals, from the files of runs."""

from __future__ import annotations

import numpy as np
import pytest

from fd_large.engine.predictions import Predictions
from fd_large.evaluation.transfer.intervals import of_runs, single_class
from fd_large.probes import redrawn


@pytest.fixture
def runs(tmp_path):
    """Two rows of two seeds: accuracies of 80 and 60 per cent, mIoUs about 50 and 45."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 5, 2000)
    labels[:10] = -1
    counts = redrawn.redraws(100)
    of_images = rng.random((100, 1))
    rows = []
    for row, (accuracy, m_iou) in enumerate(((0.8, 50.0), (0.6, 45.0))):
        rows.append([])
        for seed in range(2):
            run = tmp_path / f"row_{row}" / f"seed_{seed}"
            for step in (3, 12):
                (run / f"evaluations/update_{step:08d}").mkdir(parents=True)
            wrong = rng.random(2000) > accuracy
            Predictions(np.where(wrong, labels + 1, labels), labels).write(run)
            of_draws = m_iou + 10 * (counts @ of_images)[:, 0] / 100 - 5 + 0.1 * seed
            score = float(m_iou + 0.1 * seed)
            redrawn.write(run / "evaluations/update_00000003", "v", {"val_mIoU": (0.0, of_draws)})
            redrawn.write(run / "evaluations/update_00000012", "v", {"val_mIoU": (score, of_draws)})
            rows[-1].append(run)
    return rows


def test_accuracies_and_scores_of_draws_have_intervals_over_images_and_seeds(runs):
    found = of_runs(*runs, "test_top1")
    assert found["mean"] == pytest.approx(20, abs=2)
    assert (found["over"], found["needs_seeds"]) == ("images and seeds", False)
    m_iou = of_runs(*runs, "val_mIoU")
    assert m_iou["mean"] == pytest.approx(5), "of the newest evaluation"
    # Both rows rise and fall alike with the images.
    assert m_iou["interval_of_images"] == pytest.approx([5, 5])
    assert m_iou["is_shown"]
    one = of_runs(*(row[:1] for row in runs), "test_top1")
    assert (one["over"], one["is_shown"], one["needs_seeds"]) == ("images", False, True)


def test_without_the_files_of_every_run_there_is_none(runs):
    (first, *_), others = runs
    (first / "predictions.npz").unlink()
    assert of_runs(*runs, "test_top1") is None
    assert of_runs(*runs, "box_AP") is None
    (others[1] / "evaluations/update_00000012/redrawn.json").write_text("{}")
    assert of_runs(*runs, "val_mIoU") is None
    labels = np.zeros(2000, np.int64)
    Predictions(labels, labels).write(first)
    assert of_runs(*runs, "test_top1") is None, "other test images"


def test_predictions_of_a_single_class(tmp_path):
    labels = np.array([0, 1, 1, -1])
    assert not single_class(tmp_path)
    Predictions(labels, labels).write(tmp_path)
    assert not single_class(tmp_path)
    Predictions(np.array([2, 2, 2, 0]), labels).write(tmp_path)
    assert single_class(tmp_path), "of what cannot be read, nothing is predicted"
