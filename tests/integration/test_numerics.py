"""DeepSpeed in every setting against one plain torch process: losses, masters, bytes, hashes.

A launch costs eight seconds, so many settings share one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from launch import read_results, run_ranks

PROGRAM = Path(__file__).parent / "programs" / "scenarios.py"
sys.path.insert(0, str(PROGRAM.parent))

import scenarios  # noqa: E402
from scenarios import ZERO1, ZERO2, ZERO3  # noqa: E402

pytestmark = [pytest.mark.multirank, pytest.mark.slow]

ON_HOST = {"device": "cpu", "pin_memory": False}
BF16 = {"engine": {"precision": "bfloat16"}}
FLOAT32_BOUND, BFLOAT16_BOUND = 1e-5, 1e-2


def micro(size: int) -> dict[str, Any]:
    return {"batch": {"micro_batch_size": size}}


ONE_RANK = {
    "zero3": {"zero": ZERO3},
    "zero0": {"zero": {"stage": 0}},
    # Nothing to split: it is stage 0.
    "zero2": {"zero": ZERO2},
    "zero1 bf16": {"run": BF16, "zero": ZERO1},
}
TWO_RANKS = {
    "zero3": {"zero": ZERO3},
    "zero3 bf16": {"run": BF16, "zero": {**ZERO3, "stage3_param_persistence_threshold": "auto"}},
    "zero3 whole share": {"run": micro(6), "zero": ZERO3},
    "zero3 every block": {
        "run": {"student": {"activation_checkpointing": "every"}},
        "zero": ZERO3,
    },
    "zero3 offloaded inputs": {
        "run": {"student": {"activation_checkpointing": "offload", "checkpoint_every": 2}},
        "zero": ZERO3,
    },
    "zero3 recomputed attention": {
        "run": {"student": {"attention_memory": "recompute"}},
        "zero": ZERO3,
    },
    "zero3 offload": {
        "zero": {**ZERO3, "offload_optimizer": ON_HOST, "offload_param": ON_HOST},
    },
    "zero2": {"zero": ZERO2},
    "zero2 bf16": {"run": BF16, "zero": ZERO2},
    "zero1": {"zero": ZERO1},
    "zero1 bf16": {"run": BF16, "zero": ZERO1},
}
THREE_RANKS = {"zero3": {"zero": ZERO3}, "zero3 whole share": {"run": micro(4), "zero": ZERO3}}
NODES = {"engine": {"node_size": 2}, "teacher": {"placement": "node"}, **micro(3)}
FOUR_RANKS = {
    "hpz, node": {"run": NODES, "zero": {**ZERO3, "zero_hpz_partition_size": "auto"}},
    "hpz, node, bf16": {
        "run": {**NODES, "engine": {"node_size": 2, "precision": "bfloat16"}},
        "zero": {**ZERO3, "zero_hpz_partition_size": "auto"},
    },
    "zero1, node": {"run": NODES, "zero": ZERO1},
}


@pytest.fixture(scope="module")
def plain() -> list[float]:
    return scenarios.plain_losses(scenarios.tiny_run())


@pytest.mark.parametrize(
    ("ranks", "settings"),
    [(1, ONE_RANK), (2, TWO_RANKS), (3, THREE_RANKS), (4, FOUR_RANKS)],
    ids=["1 rank", "2 ranks", "3 ranks", "4 ranks as 2 nodes"],
)
def test_losses_masters_and_bytes(
    ranks: int, settings: dict[str, Any], plain: list[float], tmp_path: Path
) -> None:
    (tmp_path / "scenarios.json").write_text(json.dumps(settings))
    run_ranks(PROGRAM, tmp_path, ranks=ranks, timeout=400, results=tmp_path)
    by_rank = read_results(tmp_path, ranks)
    for name in settings:
        result = by_rank[0][name]
        bound = BFLOAT16_BOUND if "bf16" in name else FLOAT32_BOUND
        worst = max(abs(a - b) / b for a, b in zip(result["losses"], plain, strict=True))
        assert worst <= bound, f"{name}: losses {worst:.1e} from plain torch's"
        assert result["losses"][-1] < 0.5 * result["losses"][0], f"{name}: it must learn"
        assert result["master_error"] == 0.0, f"{name}: masters are not exact"
        assert len({h for r in by_rank for h in r[name]["teacher_hash"]}) == 1, name
        for held in result["held_bytes"]:
            assert held == pytest.approx(result["planned_bytes"], rel=0.05), name
    teacher = by_rank[0]
    if ranks == 4:
        whole = 1_485_032
        for held in teacher["hpz, node"]["teacher_bytes"]:
            assert held == pytest.approx(whole / 2, rel=0.01), "half a teacher on each of two ranks"


def test_one_rank_alone_and_many_see_the_same_teacher(tmp_path: Path) -> None:
    settings = {
        "replicated": {
            "run": {"teacher": {"placement": "replicated"}},
            "zero": ZERO3,
            "updates": 1,
        },
        "sharded": {"zero": ZERO3, "updates": 1},
    }
    (tmp_path / "scenarios.json").write_text(json.dumps(settings))
    hashes, losses = set(), []
    for ranks in (1, 2):
        run_ranks(PROGRAM, tmp_path, ranks=ranks, timeout=120, results=tmp_path)
        for result in read_results(tmp_path, ranks)[0].values():
            hashes |= set(result["teacher_hash"])
            losses.append(result["losses"][0])
    assert len(hashes) == 1
    assert max(losses) - min(losses) < 1e-6
