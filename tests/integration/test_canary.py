"""A bit of the teacher flips on one rank: it is named, and all ranks stop in the same step."""

from __future__ import annotations

import json
from pathlib import Path

from launch import ROOT, read_results, run_ranks
from pictures import write_pictures

PROGRAM = ROOT / "tests/integration/programs/flipped.py"


def test_the_rank_whose_teacher_changed_is_named_and_all_stop(tmp_path: Path) -> None:
    pictures = write_pictures(tmp_path / "pictures", 26)
    run_ranks(PROGRAM, tmp_path, pictures, ranks=4, results=tmp_path, timeout=240)
    results = read_results(tmp_path, 4)

    def part(name: str) -> list[str]:
        return [result[name]["hash"].split()[0] for result in results]

    assert part("replicated") == ["1/1"] * 4
    assert part("node") == ["1/2", "2/2"] * 2
    assert part("sharded") == ["1/4", "2/4", "3/4", "4/4"]
    for name, done, rank, checkpoints in (
        ("replicated", 3, 2, ["step_00000002"]),
        ("node", 3, 1, ["step_00000002"]),
        # Seen before the checkpoint of step 4, which is not written.
        ("sharded", 4, 3, ["step_00000002"]),
    ):
        folder = tmp_path / name
        assert [result[name]["code"] for result in results] == [3] * 4, name
        assert [result[name]["done"] for result in results] == [done] * 4, name
        assert json.loads((folder / "summary.json").read_text())["status"] == "teacher changed"
        assert sorted(path.name for path in folder.glob("checkpoints/*")) == checkpoints, name
        errors = [
            line
            for line in (folder / "logs/rank_00000.log").read_text().splitlines()
            if " ERROR fd_large.tasks.distillation.canary" in line
        ]
        assert len(errors) == 1, errors
        named = [r for r in range(4) if f"rank {r} (" in errors[0]]
        assert named == [rank], errors
