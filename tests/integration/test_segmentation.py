"""The giant's segmentation in small: two ranks as one, killed and resumed, tested, predicted."""

from __future__ import annotations

from pathlib import Path

import dense_runs
import numpy as np
import pytest
from dense_runs import scores, scores_in, train
from PIL import Image
from segmentation_twin import flags, write_images

from fd_large.data.sampler import epoch_order

# The whole batch of the first step has no label.
IGNORED = tuple(epoch_order(8, 0, 0, np.arange(4)).tolist())


@pytest.fixture(scope="module")
def ade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("ade"), 8, ignored=IGNORED)


@pytest.fixture(scope="module")
def calm(ade: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(flags, ade, tmp_path_factory.mktemp("calm") / "run", ranks=2)


@pytest.mark.closeness
def test_two_ranks_are_one_process(ade: Path, calm: Path, tmp_path: Path) -> None:
    one = dense_runs.check_one_process(flags, ade, calm, tmp_path / "one")
    counts = [np.array(scores_in(run)["confusion"]) for run in (calm, one)]
    # A pixel between two classes may go to either; none did where this was written.
    assert np.abs(counts[0] - counts[1]).sum() <= 1e-3 * counts[0].sum()


def test_a_killed_run_goes_on_to_the_bit(ade: Path, calm: Path, tmp_path: Path) -> None:
    compared = dense_runs.check_kill_and_resume(flags, ade, calm, tmp_path)
    assert any(name.endswith("running_var") for name in compared)


def test_a_run_is_scored_on_any_number_of_ranks(ade: Path, calm: Path, tmp_path: Path) -> None:
    for out in dense_runs.check_evaluations(calm, ade, tmp_path, metric="mIoU", ranks=(1, 2)):
        assert scores(out)["confusion"] == scores_in(calm)["confusion"]
        names = {path.name for path in out.glob("*.png")}
        assert names == {"worst.png", "chosen.png", "confusion.png"}


def test_a_run_predicts(ade: Path, calm: Path, tmp_path: Path) -> None:
    image = next((ade / "images/validation").iterdir())
    said, seen = dense_runs.predict(calm, image, tmp_path)
    assert "%" in said
    assert sum(seen["classes"].values()) == pytest.approx(1)
    labels = np.array(Image.open(tmp_path / seen["labels"]))
    assert labels.shape == np.array(Image.open(image)).shape[:2]
