"""Detectors on two ranks under ZeRO-3: the losses of one process, and batches of any content."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from closeness import distance
from launch import read_results, run_ranks

PROGRAM = Path(__file__).parent / "programs" / "detection_ranks.py"
CASCADE = "coco_mask_rcnn_vit_base"


@pytest.mark.closeness
@pytest.mark.parametrize(
    ("batches", "runs"),
    [(10, ["htc"]), pytest.param(100, ["htc", CASCADE], marks=pytest.mark.sweep)],
)
def test_as_one_process_and_never_out_of_step(
    batches: int, runs: list[str], tmp_path: Path
) -> None:
    run_ranks(PROGRAM, tmp_path, batches, *runs, ranks=2, results=tmp_path, timeout=900)
    results = read_results(tmp_path, 2)
    for name in ("coco_mask_rcnn_swinv2_giant", CASCADE, "clip", "htc"):
        for found in results:
            assert distance(found[name]["together"], found[name]["alone"]) <= 1e-5, name
            assert found[name]["alone"][2] < 0.6 * found[name]["alone"][0], name
    for name in runs:
        for found in results:
            losses = found["random"][name]["losses"]
            assert len(losses) == batches
            assert all(map(math.isfinite, losses))
            if batches >= 100:  # In fewer, chance outweighs what was learnt.
                assert sum(losses[-10:]) < sum(losses[:10])
        # What is in an image of no pixels is nothing.
        assert results[0]["random"][name]["found"] == 0
        assert results[1]["random"][name]["found"] > 0
