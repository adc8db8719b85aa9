"""The giant's depth in small: two ranks as one, killed and resumed, tested, predicted."""

from __future__ import annotations

from pathlib import Path

import dense_runs
import numpy as np
import pytest
from dense_runs import scores, scores_in, train
from depth_images import write_images
from depth_twin import flags

from fd_large.data.sampler import epoch_order

# In the first step no image has a depth, in the second none of the second of two ranks.
WITHOUT = tuple(epoch_order(12, 0, 0, np.array([0, 1, 2, 3, 6, 7])).tolist())


@pytest.fixture(scope="module")
def nyu(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("nyu"), 12, without=WITHOUT)


@pytest.fixture(scope="module")
def calm(nyu: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(flags, nyu, tmp_path_factory.mktemp("calm") / "run", ranks=2)


@pytest.mark.closeness
def test_two_ranks_are_one_process(nyu: Path, calm: Path, tmp_path: Path) -> None:
    one = dense_runs.check_one_process(flags, nyu, calm, tmp_path / "one")
    first, second = (scores_in(run) for run in (calm, one))
    assert first["rmse"] == pytest.approx(second["rmse"], rel=1e-4)


def test_a_killed_run_goes_on_to_the_bit(nyu: Path, calm: Path, tmp_path: Path) -> None:
    compared = dense_runs.check_kill_and_resume(flags, nyu, calm, tmp_path)
    assert any(name.endswith("running_var") for name in compared)


def test_a_run_is_scored_on_any_number_of_ranks(nyu: Path, calm: Path, tmp_path: Path) -> None:
    for out in dense_runs.check_evaluations(calm, nyu, tmp_path, metric="rmse", ranks=(1, 3)):
        assert scores(out) == scores_in(calm)
        assert {path.name for path in out.glob("*.png")} == {"worst.png", "chosen.png"}


def test_a_run_predicts(nyu: Path, calm: Path, tmp_path: Path) -> None:
    image = next((nyu / "official_splits/test").rglob("*.jpg"))
    said, seen = dense_runs.predict(calm, image, tmp_path)
    assert " m, median " in said
    depth = np.load(tmp_path / seen["depth"])
    assert depth.shape == (72, 96)
    assert seen["nearest"] == pytest.approx(depth.min())
