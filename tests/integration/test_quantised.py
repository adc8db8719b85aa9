"""What weights that travel in 8 bits change, on real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import read_results, run_ranks

PROGRAM = Path(__file__).parent / "programs" / "quantised.py"


def test_weights_in_eight_bits_change_the_losses_a_little(tmp_path: Path) -> None:
    run_ranks(PROGRAM, tmp_path, ranks=2, timeout=240, results=tmp_path)
    found = read_results(tmp_path, 2)[0]
    assert found["eight_bits"] != found["exact"]
    assert found["eight_bits"] == pytest.approx(found["exact"], rel=0.03)
