"""The giant's segmentation in small: two ranks as one, killed and resumed, tested, predicted."""

from __future__ import annotations

import json
import time
from pathlib import Path

import numpy as np
import pytest
from kills import resumed_from, state, updates_done
from launch import ROOT, run_ranks, start_ranks
from PIL import Image
from segmentation_twin import flags, write_images
from twin import TRAIN, losses

from fd_large.data.sampler import epoch_order

UPDATES = 5
# The whole batch of the first step has no label.
IGNORED = tuple(epoch_order(8, 0, 0, np.arange(4)).tolist())


@pytest.fixture(scope="module")
def ade(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_images(tmp_path_factory.mktemp("ade"), 8, ignored=IGNORED)


@pytest.fixture(scope="module")
def calm(ade: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("calm") / "run"
    run_ranks(TRAIN, *flags(ade, run_dir, UPDATES, ranks=2), ranks=2, timeout=240)
    return run_dir


def scores(folder: Path) -> dict:
    return json.loads((folder / "scores.json").read_text())


def test_two_ranks_are_one_process(ade: Path, calm: Path, tmp_path: Path) -> None:
    run_ranks(TRAIN, *flags(ade, tmp_path / "one", UPDATES, ranks=1), ranks=1, timeout=240)
    alone, together = losses(tmp_path / "one"), losses(calm)
    assert together == pytest.approx(alone, rel=1e-5)
    assert alone[0] == 0 < min(alone[1:])
    last = f"evaluations/update_{UPDATES:08d}"
    counts = [np.array(scores(run / last)["confusion"]) for run in (calm, tmp_path / "one")]
    # A pixel between two classes may go to either; none did where this was written.
    assert np.abs(counts[0] - counts[1]).sum() <= 1e-3 * counts[0].sum()


def test_a_killed_run_goes_on_to_the_bit(ade: Path, calm: Path, tmp_path: Path) -> None:
    given = flags(ade, tmp_path, UPDATES, ranks=2)
    started = start_ranks(TRAIN, *given, ranks=2)
    try:
        deadline = time.monotonic() + 180
        while updates_done(started) < 3:
            assert time.monotonic() < deadline, "".join(started.outputs())
            assert started.processes[0].poll() is None, "".join(started.outputs())
            time.sleep(0.02)
    finally:
        started.kill()
    again = start_ranks(TRAIN, *given, ranks=2)
    try:
        assert [process.wait(timeout=240) for process in again.processes] == [0, 0]
        assert 0 < resumed_from(again) < UPDATES
    finally:
        again.kill()
    assert losses(tmp_path) == losses(calm)
    first, second = state(calm, UPDATES), state(tmp_path, UPDATES)
    assert first.keys() == second.keys()
    assert any(name.endswith("running_var") for name in first)
    for name, values in first.items():
        assert values.equal(second[name]), name


def test_a_run_is_scored_on_any_number_of_ranks(ade: Path, calm: Path, tmp_path: Path) -> None:
    in_run = scores(calm / f"evaluations/update_{UPDATES:08d}")
    assert json.loads((calm / "summary.json").read_text())["val_mIoU"] == in_run["mIoU"]
    for ranks in (1, 2):
        out = tmp_path / str(ranks)
        finished = run_ranks(
            *(ROOT / "fd_large/__main__.py", "evaluate", calm),
            *("--data.root", ade, "--out", out, "--data.workers", "0"),
            ranks=ranks,
        )
        assert "mIoU" in finished.outputs[0]
        assert not any("mIoU" in output for output in finished.outputs[1:])
        assert scores(out)["confusion"] == in_run["confusion"]
        names = {path.name for path in out.glob("*.png")}
        assert names == {"worst.png", "chosen.png", "confusion.png"}


def test_a_run_predicts(ade: Path, calm: Path, tmp_path: Path) -> None:
    image = next((ade / "images/validation").iterdir())
    finished = run_ranks(
        *(ROOT / "fd_large/__main__.py", "predict", calm, image, "--out", tmp_path), ranks=1
    )
    assert "%" in finished.outputs[0]
    seen = json.loads((tmp_path / "predictions.json").read_text())[str(image)]
    assert sum(seen["classes"].values()) == pytest.approx(1)
    labels = np.array(Image.open(tmp_path / seen["labels"]))
    assert labels.shape == np.array(Image.open(image)).shape[:2]
