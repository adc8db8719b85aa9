from __future__ import annotations

import json

import pytest

from fd_large.errors import DataError
from fd_large.tasks.detection.scores.results import merge, read_results, write_results


def result(image: int, score: float = 0.5, **changes) -> dict:
    return {
        "image_id": image,
        "category_id": 3,
        "bbox": [1.0, 2.0, 3.0, 4.0],
        "score": score,
        "segmentation": {"size": [9, 9], "counts": "Q1"},
    } | changes


def test_a_file_returns_what_was_written_and_leaves_nothing_beside_it(tmp_path):
    results = [result(1), result(2, 0.1 + 0.2)]
    write_results(tmp_path / "results.json", results)
    assert read_results(tmp_path / "results.json") == results
    assert [path.name for path in tmp_path.iterdir()] == ["results.json"]


def test_shards_merge_alike_however_pictures_were_dealt():
    pictures = {n: [result(n, score) for score in (0.5, 0.9, 0.5001)] for n in range(7)}
    flat = [entry for of_image in pictures.values() for entry in of_image]
    for world_size in (1, 2, 3):
        shards = [
            [entry for n in range(rank, 7, world_size) for entry in pictures[n]]
            for rank in range(world_size)
        ]
        assert merge(shards) == flat


def test_a_picture_of_two_shards_counts_once_and_so_do_equal_results():
    first = [result(4, 0.5), result(4, 0.5), result(4, 0.6)]
    second = [result(4, 0.7), result(2, 0.5)]
    assert merge([first, second]) == [result(2, 0.5), result(4, 0.5), result(4, 0.6)]
    other_mask = result(4, 0.5, segmentation={"size": [9, 9], "counts": "Q2"})
    assert merge([[result(4, 0.5), other_mask]]) == [result(4, 0.5), other_mask]
    assert merge([[], []]) == []


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{}", "got dict"),
        ("[", "not JSON"),
        ("[3]", "got int in entry 0"),
        ([result(1), result("1")], "no whole number 'image_id' in entry 1"),
        ([result(1, category_id=None)], "'category_id'"),
        ([result(1, score=float("nan"))], "no number 'score'"),
        ([{k: v for k, v in result(1).items() if k not in ("bbox", "segmentation")}], "neither"),
        ([result(1, bbox=[1, 2, 3])], "not four numbers"),
        ([result(1, bbox=[1, 2, 3, float("inf")])], "not four numbers"),
        ([result(1, segmentation=[[1, 2, 3, 4, 5, 6]])], "no size and compressed counts"),
        ([result(1, segmentation={"size": [9, 9], "counts": [81]})], "no size and compressed"),
    ],
)
def test_what_is_no_results_file_is_refused(tmp_path, content, message):
    path = tmp_path / "results.json"
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    with pytest.raises(DataError, match=f"{message}.*[sS]et --detections"):
        read_results(path)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(DataError, match=r"none\.json"):
        read_results(tmp_path / "none.json")


@pytest.mark.parametrize(
    "changes",
    [
        {"image_id": 2**70},
        {"category_id": -(2**70)},
        {"score": 10**400},
        {"bbox": [0, 0, 10**400, 1]},
    ],
)
def test_numbers_that_nothing_holds_are_refused(tmp_path, changes):
    (tmp_path / "results.json").write_text(json.dumps([result(1), result(2, **changes)]))
    with pytest.raises(DataError, match=r"entry 1 .*--detections"):
        read_results(tmp_path / "results.json")
