"""All ranks take the same AdamW, also where FusedAdam fails or is wrong on one of them alone."""

from pathlib import Path

from launch import read_results, run_ranks

PROGRAM = Path(__file__).parent / "programs" / "fused_optimiser.py"


def test_one_rank_without_fused_adam_decides_for_all(tmp_path: Path) -> None:
    run_ranks(PROGRAM, tmp_path, ranks=2, results=tmp_path, timeout=120)
    assert read_results(tmp_path, 2) == [["FusedAdam", "AdamW", "AdamW"]] * 2
