from __future__ import annotations

import numpy as np
import pytest
from coco import CATEGORIES, annotation

from fd_large.tasks.detection.scores import pictures
from fd_large.tasks.detection.scores.pictures import draw_evaluation
from fd_large.tasks.detection.scores.scoring import score

BOX = [10, 10, 40, 60]


@pytest.fixture
def drawn(monkeypatch):
    """Which images were drawn into which file."""
    seen = {}

    def draw(rows, path):
        seen[path.name] = [row.title.split(":")[0] for row in rows]
        path.write_bytes(b"")

    monkeypatch.setattr(pictures, "draw_rows", draw)
    return seen


def evaluation(count: int, found: list[int]) -> tuple[dict, list[dict]]:
    images = [
        {"id": n, "height": 90, "width": 120, "file_name": f"{n}.jpg"} for n in range(1, count + 1)
    ]
    annotations = [annotation(n, n, BOX) for n in range(1, count + 1)]
    results = [{"image_id": n, "category_id": 3, "bbox": BOX, "score": 0.9} for n in found]
    return {"images": images, "annotations": annotations, "categories": CATEGORIES}, results


def draw(truth, results, folder, **chosen):
    def read(number: int) -> np.ndarray:
        return np.zeros((90, 120, 3), dtype=np.uint8)

    return draw_evaluation(truth, results, score(truth, results), read, folder, **chosen)


def test_worst_and_spread_images_and_curves(drawn, tmp_path):
    truth, results = evaluation(10, found=[1, 2, 4, 5, 6, 7, 8, 10])
    paths = draw(truth, results, tmp_path)
    assert [path.name for path in paths] == ["worst.png", "chosen.png", "curves.png"]
    assert all(path.is_file() for path in paths)
    assert drawn == {
        "worst.png": ["3.jpg", "9.jpg"],
        "chosen.png": [f"{n}.jpg" for n in (1, 4, 7, 10)],
    }
    draw(truth, results, tmp_path, chosen=[5])
    assert drawn["chosen.png"] == ["5.jpg"]


def test_where_nothing_is_wrong_an_older_picture_of_the_worst_goes(drawn, tmp_path):
    draw(*evaluation(2, found=[1]), tmp_path)
    assert (tmp_path / "worst.png").exists()
    paths = draw(*evaluation(2, found=[1, 2]), tmp_path)
    assert [path.name for path in paths] == ["chosen.png", "curves.png"]
    assert not (tmp_path / "worst.png").exists()
