"""An evaluation from images to files, on one rank, with a detector that knows the answers."""

from __future__ import annotations

import json
import logging
import multiprocessing
import threading

import pytest
import torch
from coco import annotation, write_set

from fd_large.data.decode import MAX_PIXELS
from fd_large.engine.evaluation import Interrupted
from fd_large.errors import DataError
from fd_large.tasks.detection.data.annotations import open_coco
from fd_large.tasks.detection.heads.selection import Detections, Selection
from fd_large.tasks.detection.scores import evaluation
from fd_large.tasks.detection.scores.evaluation import evaluate, keep
from fd_large.tasks.detection.scores.views import Model, TestViews
from fd_large.tasks.detection.task import Ask

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
SIZES = {1: (40, 40), 2: (40, 40)}
BOX = [4.0, 4.0, 30.0, 30.0]


def knows(images: torch.Tensor, sizes: torch.Tensor, ask: Ask | None) -> list[Detections]:
    assert ask is None
    left, top, width, height = BOX
    seen = Detections(
        torch.tensor([[left, top, left + width, top + height]]),
        torch.tensor([0.9]),
        torch.tensor([0]),
        torch.ones(1, 28, 28),
    )
    return [seen] * len(images)


MODEL = Model(knows, TestViews(40, 40), Selection(), 100)


def evaluated(root, folder):
    pictures = open_coco(str(root), "val")
    folder.mkdir(exist_ok=True)
    outcome = evaluate(MODEL, pictures, folder, batch_size=2, workers=0, max_pixels=MAX_PIXELS)
    drawn = keep(outcome, pictures, folder, draw=True, max_pixels=MAX_PIXELS)
    return json.loads((folder / "scores.json").read_text()), {path.name for path in drawn}


@pytest.fixture
def root(tmp_path):
    annotations = [annotation(number, number, BOX) for number in SIZES]
    return write_set(tmp_path / "set", annotations, sizes=SIZES, split="val")


def test_a_picture_that_cannot_be_read_is_missed_and_told(root, tmp_path, caplog):
    scores, drawn = evaluated(root, tmp_path / "out")
    assert scores["unread_images"] == 0
    assert scores["box"]["numbers"]["AP"] == 1
    assert "worst.png" not in drawn
    (root / "val2017" / "000000000002.png").write_bytes(b"no image")
    with caplog.at_level(logging.WARNING):
        scores, drawn = evaluated(root, tmp_path / "out")
    # Found up to recall 0.5, which 51 of COCO's 101 places are.
    assert scores["box"]["numbers"]["AP"] == pytest.approx(51 / 101)
    assert scores["unread_images"] == 1
    assert "1 of 2 test images could not be read" in caplog.text
    # It is the worst of all, and drawn in grey.
    assert drawn == {"worst.png", "chosen.png", "curves.png"}


def test_what_a_killed_evaluation_left_is_swept(root, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    for name in ("results_of_rank_0.json", "results_of_rank_7.json", "results_of_rank_5.json.part"):
        (out / name).write_text("half of")
    scores, _ = evaluated(root, out)
    assert scores["num_results"] == 2
    assert not list(out.glob("results_of_rank_*"))


def test_an_evaluation_that_is_left_leaves_nothing(root, tmp_path):
    pictures, out = open_coco(str(root), "val"), tmp_path / "out"
    out.mkdir()

    def leave(done: int, total: int) -> None:
        if done == 1:
            raise Interrupted

    try:
        evaluate(
            MODEL, pictures, out, batch_size=1, workers=1,
            max_pixels=MAX_PIXELS, between=leave,
        )  # fmt: skip
        raise AssertionError("not left")
    except Interrupted:
        pass
    assert multiprocessing.active_children() == []
    assert list(out.iterdir()) == []


@pytest.fixture
def slow_scores(monkeypatch):
    """An event that scoring waits for; whether it came."""
    go, came, score = threading.Event(), [], evaluation.score

    def slow(*arguments):
        came.append(go.wait(30))
        return score(*arguments)

    monkeypatch.setattr(evaluation, "score", slow)
    monkeypatch.setattr(evaluation, "SECONDS_BETWEEN_CALLS", 0.01)
    yield go, came
    go.set()


def scored(root, out, between):
    out.mkdir()
    return evaluate(
        MODEL, open_coco(str(root), "val"), out, batch_size=1, workers=0,
        max_pixels=MAX_PIXELS, between=between,
    )  # fmt: skip


def test_the_run_moves_while_rank_0_scores(root, tmp_path, slow_scores):
    go, came = slow_scores
    calls = []

    def between(done: int, total: int) -> None:
        calls.append((done, total))
        if calls.count((2, 2)) == 3:
            go.set()

    outcome = scored(root, tmp_path / "out", between)
    assert came == [True]
    assert calls[:5] == [(0, 2), (1, 2), (2, 2), (2, 2), (2, 2)]
    assert outcome.scores.num_results == 2


def test_a_stop_ends_the_scoring(root, tmp_path, slow_scores):
    def leave(done: int, total: int) -> None:
        if done == total:
            raise Interrupted

    with pytest.raises(Interrupted):
        scored(root, tmp_path / "out", leave)


def test_what_cannot_be_scored_is_told(root, tmp_path, monkeypatch):
    def refuse(*_):
        raise DataError("detections: of other images")

    monkeypatch.setattr(evaluation, "score", refuse)
    with pytest.raises(DataError, match="of other images"):
        scored(root, tmp_path / "out", lambda done, total: None)
