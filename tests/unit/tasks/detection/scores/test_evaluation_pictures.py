from __future__ import annotations

import numpy as np
import pytest
from coco import CATEGORIES, annotation
from matplotlib.colors import to_rgb
from PIL import Image

from fd_large.tasks.detection.scores import evaluation_pictures
from fd_large.tasks.detection.scores.evaluation_pictures import CURVE_COLOURS, draw_evaluation
from fd_large.tasks.detection.scores.scoring import score

BOX = [10, 10, 40, 60]


@pytest.fixture
def drawn(monkeypatch):
    """Which images were drawn into which file."""
    seen = {}

    def draw(rows, path):
        seen[path.name] = [row.title.split(":")[0] for row in rows]
        path.write_bytes(b"")

    monkeypatch.setattr(evaluation_pictures, "draw_rows", draw)
    return seen


def draw(folder, count: int, found: list[int]) -> list[str]:
    """Draws an evaluation of images with an object each; returns the names of the pictures."""
    images = [
        {"id": n, "height": 90, "width": 120, "file_name": f"{n}.jpg"} for n in range(1, count + 1)
    ]
    annotations = [annotation(n, n, BOX) for n in range(1, count + 1)]
    truth = {"images": images, "annotations": annotations, "categories": CATEGORIES}
    results = [{"image_id": n, "category_id": 3, "bbox": BOX, "score": 0.9} for n in found]
    black = np.zeros((90, 120, 3), dtype=np.uint8)
    paths = draw_evaluation(truth, results, score(truth, results), lambda number: black, folder)
    assert all(path.is_file() for path in paths)
    return [path.name for path in paths]


def test_worst_and_spread_images_and_curves(drawn, tmp_path):
    names = draw(tmp_path, 10, found=[1, 2, 4, 5, 6, 7, 8, 10])
    assert names == ["worst.png", "chosen.png", "curves.png"]
    assert drawn["worst.png"] == ["3.jpg", "9.jpg"]
    assert drawn["chosen.png"] == [f"{n}.jpg" for n in (1, 4, 7, 10)]
    curves = np.asarray(Image.open(tmp_path / "curves.png").convert("RGB")).astype(float)
    for colour in CURVE_COLOURS:
        near = np.abs(curves - np.array(to_rgb(colour)) * 255).max(-1) < 6
        assert near.sum() > 100


def test_where_nothing_is_wrong_an_older_picture_of_the_worst_goes(drawn, tmp_path):
    draw(tmp_path, 2, found=[1])
    assert (tmp_path / "worst.png").exists()
    assert draw(tmp_path, 2, found=[1, 2]) == ["chosen.png", "curves.png"]
    assert not (tmp_path / "worst.png").exists()
