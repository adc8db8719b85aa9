"""The plan's bytes against those of real ranks."""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import read_results, run_ranks
from page_examples import EXAMPLES

PROGRAM = Path(__file__).parent / "programs" / "held_bytes.py"


def test_bytes_between_updates_are_the_plans(tmp_path: Path) -> None:
    (tmp_path / "convnet.py").write_text(EXAMPLES["convnet.py"])
    run_ranks(PROGRAM, tmp_path, ranks=2, timeout=240, results=tmp_path)
    results = read_results(tmp_path, 2)[0]
    assert len(results) == 15
    worst = 0.0
    for name, result in results.items():
        for measured in result["measured"]:
            worst = max(worst, abs(measured / result["planned"] - 1))
            assert measured == pytest.approx(result["planned"], rel=0.01), name
    print(f"worst: {100 * worst:.2f} %")
