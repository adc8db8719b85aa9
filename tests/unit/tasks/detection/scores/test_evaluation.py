"""An evaluation from images to files, on one rank, with a detector that knows the answers."""

from __future__ import annotations

import json
import logging
import multiprocessing

import pytest
import torch
from coco import annotation, write_set

from fd_large.data.image_header import MAX_PIXELS
from fd_large.engine.evaluation import Interrupted
from fd_large.probes.redrawn import read
from fd_large.recipes.file_names import of_step
from fd_large.tasks.detection.data.annotations import open_coco
from fd_large.tasks.detection.heads.selection import Detections, Selection
from fd_large.tasks.detection.scores.evaluation import evaluate, left_in, scoring_of
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


@pytest.fixture
def root(tmp_path):
    annotations = [annotation(number, number, BOX) for number in SIZES]
    return write_set(tmp_path / "set", annotations, sizes=SIZES, split="val")


def begun(root, folder, **more):
    given = {"batch_size": 2, "workers": 0, "max_pixels": MAX_PIXELS, "draw": False, **more}
    return evaluate(MODEL, open_coco(str(root), "val"), folder, **given)


def test_all_that_an_evaluation_leaves(root, tmp_path, caplog):
    """In the process that scores; one of the two images cannot be read."""
    (root / "val2017" / "000000000002.png").write_bytes(b"no image")
    out = tmp_path / "out"
    out.mkdir()
    for name in ("results_of_rank_7.json", "results_of_rank_5.json.part"):
        (out / name).write_text("half of what a killed evaluation on more ranks left")
    with caplog.at_level(logging.WARNING):
        scoring = begun(root, out, draw=True)
    assert "1 of 2 test images could not be read" in caplog.text
    numbers = scoring.wait(lambda: None)
    assert scoring.done
    assert len(numbers) == 24
    # Found up to recall 0.5, which 51 of COCO's 101 places are.
    assert numbers["box_AP"] == pytest.approx(51 / 101)
    scores = json.loads((out / "scores.json").read_text())
    assert scores["unread_images"] == 1
    assert scores["tested"] == MODEL.in_words()
    assert left_in(tmp_path, 9) is None
    scoring.forget()
    # The image is the worst of all, and drawn in grey.
    drawn = {"worst.png", "chosen.png", "curves.png", "redrawn.json"}
    assert read(out, "box_AP").score == numbers["box_AP"]
    assert read(out, "mask_AP").draws.shape == (200,)
    assert {path.name for path in out.iterdir()} == {"results.json", "scores.json"} | drawn


def test_an_evaluation_that_is_left_leaves_nothing(root, tmp_path):
    out, calls = tmp_path / "out", []

    def leave() -> None:
        calls.append(1)
        if len(calls) == 2:
            raise Interrupted

    with pytest.raises(Interrupted):
        begun(root, out, batch_size=1, workers=1, between=leave)
    assert multiprocessing.active_children() == []
    assert not out.exists()


def test_what_was_not_scored_is_taken_up_by_a_later_start(root, tmp_path):
    for step in (2, 4, 6):
        scoring = begun(root, of_step(tmp_path, step))
        scoring.give_up()
        if step == 2:
            scoring.forget()
    step, folder = left_in(tmp_path, 5)
    assert (step, folder) == (4, of_step(tmp_path, 4))
    assert left_in(tmp_path, 3) is None
    images = open_coco(str(root), "val")
    again = scoring_of(images, folder, draw=False, max_pixels=MAX_PIXELS)
    assert again.wait(lambda: None)["box_AP"] == 1
    again.forget()
    assert left_in(tmp_path, 5) is None
    assert left_in(tmp_path, 6)[0] == 6
    # As of an evaluation whose scoring failed: that of step 4 has been scored since.
    begun(root, of_step(tmp_path, 2)).give_up()
    assert left_in(tmp_path, 5) is None
    assert list(of_step(tmp_path, 2).iterdir()) == []
    assert {path.name for path in folder.iterdir()} == {"results.json", "scores.json"}
