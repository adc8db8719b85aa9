"""Rates by layer inside two groups, and the average on the partitions, at every ZeRO stage."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import read_results, run_ranks

PROGRAM = Path(__file__).parent / "programs" / "layer_rates.py"
STAGES = (0, 1, 2, 3)


@pytest.mark.closeness
def test_as_one_group_a_layer_and_as_an_average_of_whole_weights(tmp_path: Path) -> None:
    run_ranks(PROGRAM, tmp_path, *STAGES, ranks=2, results=tmp_path, timeout=240)
    for found in read_results(tmp_path, 2):
        for stage in STAGES:
            of_stage = found[str(stage)]
            assert of_stage["error"] < 1e-6, (stage, of_stage)
            assert of_stage["groups"] == 2
            assert of_stage["average"], stage
            assert of_stage["differs"], stage
            assert of_stage["back"], stage
