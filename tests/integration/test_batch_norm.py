"""A student with batch norms, from random weights: the same run on any layout of ranks."""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from closeness import distance
from launch import read_results, run_ranks

PROGRAM = Path(__file__).parent / "programs" / "scenarios.py"
sys.path.insert(0, str(PROGRAM.parent))

import scenarios  # noqa: E402

UPDATES = 3
# One group of 12 images, or three of 4, which lie inside passes or on two ranks.
LAYOUTS = {
    1: {
        "one pass": {"group": 4, "zero": scenarios.ZERO1, "micro": 12},
        "three passes": {"group": 4, "zero": scenarios.ZERO3, "micro": 4},
        "whole, recomputed": {"group": 12, "zero": scenarios.ZERO1, "micro": 12, "every": True},
    },
    2: {
        "one pass": {"group": 4, "zero": scenarios.ZERO3, "micro": 6, "every": True},
        "whole": {"group": 12, "zero": scenarios.ZERO1, "micro": 6},
    },
    3: {
        "one pass": {"group": 4, "zero": scenarios.ZERO1, "micro": 4},
        "whole": {"group": 12, "zero": scenarios.ZERO3, "micro": 4},
    },
}


def setting(layout: dict[str, Any]) -> dict[str, Any]:
    """What `scenarios.py` reads."""
    student = {
        "model": "timm:mobilenetv3_small_050",
        "architecture": {},
        "drop_path_rate": 0.3,
        "norm_batch": layout["group"],
        "activation_checkpointing": "every" if layout.get("every") else "off",
    }
    run = {
        "student": student,
        "data": {"image_size": 64},
        "objective": {"interpolation": "bilinear", "teacher_image_size": 64},
        "batch": {"global_batch_size": 12, "micro_batch_size": layout["micro"]},
    }
    return {"run": run, "zero": layout["zero"], "updates": UPDATES}


@pytest.mark.closeness
def test_ranks_stages_passes_and_recomputation_change_nothing(tmp_path: Path) -> None:
    found: dict[int, list[Any]] = {4: [], 12: []}
    for ranks, layouts in LAYOUTS.items():
        folder = tmp_path / str(ranks)
        folder.mkdir()
        named = {name: setting(layout) for name, layout in layouts.items()}
        (folder / "scenarios.json").write_text(json.dumps(named))
        run_ranks(PROGRAM, folder, ranks=ranks, timeout=170, results=folder)
        result = read_results(folder, ranks)[0]
        for name, layout in layouts.items():
            found[layout["group"]].append(result[name])
    for results in found.values():
        first, *others = (result["losses"] for result in results)
        assert first[-1] < first[0]
        for losses in others:
            assert distance(losses, first) <= 1e-6
    assert distance(found[4][0]["losses"], found[12][0]["losses"]) > 1e-4


@pytest.mark.parametrize("micro", [6, 2], ids=["a group on both ranks", "three passes"])
def test_running_statistics_move_alike_on_both_ranks(tmp_path: Path, micro: int) -> None:
    layout = {"group": 4 if micro == 6 else 2, "zero": scenarios.ZERO1, "micro": micro}
    program = PROGRAM.with_name("running_statistics.py")
    run_ranks(program, tmp_path, json.dumps(setting(layout)), ranks=2, results=tmp_path)
    first, second = read_results(tmp_path, 2)
    names = first[0].keys()
    assert names
    for mine, other in zip(first, second, strict=True):
        assert [name for name in names if mine[name] != other[name]] == []
    for before, after in pairwise(first):
        assert [name for name in names if before[name] == after[name]] == []
