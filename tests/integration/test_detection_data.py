"""COCO's images over two real ranks: the samples and the scores of one."""

from __future__ import annotations

from pathlib import Path

from coco import unpack_coco_tiny
from launch import read_results, run_ranks

PROGRAM = Path(__file__).parent / "programs" / "detection_data.py"


def test_two_ranks_see_and_score_what_one_does(tmp_path: Path) -> None:
    root = unpack_coco_tiny(tmp_path / "coco_tiny")
    found = {}
    for ranks in (1, 2):
        folder = tmp_path / str(ranks)
        folder.mkdir()
        run_ranks(PROGRAM, folder, root, ranks=ranks, results=folder)
        found[ranks] = read_results(folder, ranks)
    (alone,), (first, second) = found[1], found[2]

    for name, samples in alone["training"].items():
        assert len(samples) == 24  # 7 steps of 4, the first was done
        parts = [of_rank["training"][name] for of_rank in (first, second)]
        assert [len(part) for part in parts] == [12, 12]
        assert parts[0] | parts[1] == samples

    evaluations = [of_rank["evaluation"] for of_rank in (first, second)]
    # 54 images by 5: 11 batches make 6 on each rank.
    assert [of_rank["batches"] for of_rank in evaluations] == [6, 6]
    assert sum(of_rank["own"] for of_rank in evaluations) == alone["evaluation"]["own"] == 461
    for key in ("numbers", "image_ids"):
        assert evaluations[0][key] == alone["evaluation"][key]
    assert evaluations[0]["numbers"] == evaluations[1]["numbers"]
    assert 0.5 < evaluations[0]["numbers"]["box_AP"] < 0.99
    assert evaluations[0]["left"] == []
