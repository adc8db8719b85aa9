"""DeepSpeed in every setting against one plain torch process: losses, masters, bytes, hashes.

The settings of one number of ranks share a launch.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from closeness import distance
from launch import read_results, run_ranks

PROGRAM = Path(__file__).parent / "programs" / "scenarios.py"
sys.path.insert(0, str(PROGRAM.parent))

import scenarios  # noqa: E402
from scenarios import ZERO1, ZERO2, ZERO3  # noqa: E402

ON_HOST = {"device": "cpu", "pin_memory": False}
BF16 = {"engine": {"precision": "bfloat16"}}
# Gradients show in the third loss.
SHORT = {"updates": 3}
MANY = {"few_ranks": 1, **SHORT}
FLOAT32_BOUND, BFLOAT16_BOUND = 1e-5, 5e-3


def micro(size: int) -> dict[str, Any]:
    return {"batch": {"micro_batch_size": size}}


def student(**fields: Any) -> dict[str, Any]:
    """ZeRO-3 with another way through the student."""
    return {"run": {"student": fields}, "zero": ZERO3, **SHORT}


# A loss of whole maps, a head that mixes the tokens of an image, targets by running statistics.
OTHER_OBJECTIVE = {
    "objective": {
        "loss": "0.9 cosine_of_map + 0.1 smooth_l1",
        "head": "attention_mlp",
        "normaliser": "running",
    }
}
# What depends on all images of a step: which teachers an image learns from, and statistics.
DROPPING = {
    "teachers": {
        "first": {"normaliser": "batch", "targets": ["map", "summary"]},
        "second": {"weight": 0.5},
    },
    "weighting": {"rule": "drop"},
}
# Three teachers: of another shape, of two targets, and at a weight.
TEACHERS = {
    "teachers": {
        "one": {"loss": "mse", "weight": 0.5},
        "two": {"targets": ["map", "summary"], "summary.loss": "cosine", "head": "mlp"},
        "wide": {"architecture.embed_dim": 32, "normaliser": "none", "loss": "cosine"},
    }
}
OTHERS = {"other objective": OTHER_OBJECTIVE, "dropping": DROPPING, "teachers": TEACHERS}
NODES = {"engine": {"node_size": 2}, "teacher": {"placement": "node"}}
SETTINGS: dict[int, dict[str, Any]] = {
    1: {
        "zero3": {"zero": ZERO3},
        "zero0": {"zero": {"stage": 0}},
        # Nothing to split: it is stage 0.
        "zero2": {"zero": ZERO2},
        "zero1 bf16": {"run": BF16, "zero": ZERO1},
        "zero2 bf16": {"run": BF16, "zero": ZERO2},
        "zero3 teachers": {"run": TEACHERS, "zero": ZERO3, **SHORT},
    },
    2: {
        "zero3": {"zero": ZERO3},
        # As ds_configs/ have it.
        "zero3 bf16": {
            "run": BF16,
            "zero": {
                **ZERO3,
                "stage3_param_persistence_threshold": "auto",
                "contiguous_gradients": False,
                "reduce_bucket_size": "auto",
                "stage3_prefetch_bucket_size": "auto",
            },
        },
        "zero0": {"zero": {"stage": 0}},
        "zero3 whole share": {
            "run": micro(6),
            "zero": {
                **ZERO3,
                "contiguous_gradients": False,
                "stage3_param_persistence_threshold": "auto",
            },
            **SHORT,
        },
        "zero3 every block": student(activation_checkpointing="every"),
        "zero3 offloaded inputs": student(activation_checkpointing="offload", checkpoint_every=2),
        "zero3 recomputed attention": student(attention_memory="recompute"),
        "zero3 offload": {
            "zero": {**ZERO3, "offload_optimizer": ON_HOST, "offload_param": ON_HOST},
        },
        "zero2": {"zero": ZERO2},
        "zero3 other objective": {"run": OTHER_OBJECTIVE, "zero": ZERO3, **SHORT},
        "zero3 dropping": {"run": DROPPING, "zero": ZERO3, **SHORT},
        "zero1 dropping": {"run": DROPPING | micro(2), "zero": ZERO1, **SHORT},
        "zero3 teachers": {"run": TEACHERS | micro(2), "zero": ZERO3, **SHORT},
        "zero2 bf16": {"run": BF16, "zero": ZERO2},
        # As on so many ranks that bfloat16 sums would show.
        "zero1 bf16, float32 sums": {"run": BF16, "zero": ZERO1, **MANY},
        "zero2 bf16, float32 sums": {"run": BF16, "zero": ZERO2, **MANY},
        "zero3 bf16, float32 sums": {"run": BF16, "zero": ZERO3, **MANY},
        "zero1, teacher replicated": {
            "run": {"teacher": {"placement": "replicated"}},
            "zero": ZERO1,
        },
        "zero1 bf16": {"run": BF16, "zero": ZERO1},
        # Gradients go to all ranks.
        "zero1, many": {"run": micro(2), "zero": ZERO1, **MANY},
        "zero2, many": {
            "run": micro(2),
            "zero": {**ZERO2, "contiguous_gradients": False},
            **MANY,
        },
    },
    3: {
        "zero3": {"run": micro(2), "zero": ZERO3},
        "zero3 dropping": {"run": DROPPING | micro(4), "zero": ZERO3, **SHORT},
        "zero1 teachers": {"run": TEACHERS | micro(4), "zero": ZERO1, **SHORT},
        "zero2, many": {"run": micro(4), "zero": ZERO2, **MANY},
    },
    4: {
        "hpz, node": {"run": NODES, "zero": {**ZERO3, "zero_hpz_partition_size": "auto"}},
        "hpz, node, bf16": {
            "run": {**NODES, "engine": {"node_size": 2, "precision": "bfloat16"}},
            "zero": {**ZERO3, "zero_hpz_partition_size": "auto"},
        },
        "zero1, node": {"run": NODES, "zero": ZERO1},
    },
}
Results = list[dict[str, dict[str, Any]]]


@pytest.fixture(scope="module")
def plain() -> list[tuple[float, float]]:
    return scenarios.plain_steps(scenarios.tiny_run())


@pytest.fixture(scope="module")
def plain_of_others() -> dict[str, list[tuple[float, float]]]:
    return {
        name: scenarios.plain_steps(scenarios.tiny_run(**other), updates=3)
        for name, other in OTHERS.items()
    }


@pytest.fixture(scope="module")
def results_on(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Results]:
    """Runs all settings of so many ranks, once; returns each rank's results by setting."""

    @cache
    def run(ranks: int) -> Results:
        folder = tmp_path_factory.mktemp(f"on_{ranks}")
        (folder / "scenarios.json").write_text(json.dumps(SETTINGS[ranks]))
        run_ranks(PROGRAM, folder, ranks=ranks, timeout=400, results=folder)
        return read_results(folder, ranks)

    return run


@pytest.mark.closeness
@pytest.mark.parametrize("ranks", SETTINGS)
def test_losses_masters_and_bytes(
    ranks: int,
    plain: list[tuple[float, float]],
    plain_of_others: dict[str, list[tuple[float, float]]],
    results_on: Callable[[int], Results],
) -> None:
    by_rank, threads = results_on(ranks), int(os.environ.get("OMP_NUM_THREADS", "1"))
    for name, setting in SETTINGS[ranks].items():
        result, updates = by_rank[0][name], setting.get("updates", len(plain))
        bound = BFLOAT16_BOUND if "bf16" in name else FLOAT32_BOUND
        expected = plain_of_others.get(name.partition(" ")[2], plain[:updates])
        for kind, wanted in zip(("losses", "norms"), zip(*expected, strict=True), strict=True):
            worst = distance(result[kind], wanted)
            assert worst <= bound, f"{name}: {kind} {worst:.1e} from plain torch's"
        learns = updates < len(plain) or result["losses"][-1] < 0.5 * result["losses"][0]
        assert learns, f"{name}: it must learn"
        assert result["kernels"] == [torch.backends.cpu.get_cpu_capability(), threads]
        assert result["master_error"] == 0.0, f"{name}: masters are not exact"
        shapes = 2 if "teachers" in name else 1
        assert len({h for r in by_rank for h in r[name]["teacher_hash"]}) == shapes, name
        for held in result["held_bytes"]:
            assert held == pytest.approx(result["planned_bytes"], rel=0.05), name


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_no_gradient_of_many_ranks_is_summed_in_bfloat16(
    stage: int, results_on: Callable[[int], Results]
) -> None:
    for results in results_on(2):
        narrow = results[f"zero{stage} bf16"]["summed"]
        wide = results[f"zero{stage} bf16, float32 sums"]["summed"]
        assert narrow["bfloat16"] > 1e5
        assert "bfloat16" not in wide
        assert wide["float32"] > 1e5


@pytest.mark.closeness
def test_any_number_of_ranks_sees_the_same_teacher(results_on: Callable[[int], Results]) -> None:
    in_float32 = [
        (name, result)
        for ranks in SETTINGS
        for name, result in results_on(ranks)[0].items()
        if "bf16" not in name
    ]
    assert len({result["teacher_hash"][0] for _, result in in_float32}) == 1
    usual = [r for name, r in in_float32 if name.partition(" ")[2] not in OTHERS]
    first = [result["losses"][0] for result in usual]
    assert max(first) - min(first) < 1e-6


def test_a_node_holds_one_teacher(results_on: Callable[[int], Results]) -> None:
    whole = results_on(2)[0]["zero1, teacher replicated"]["teacher_bytes"][0]
    result = results_on(4)[0]["hpz, node"]
    for held in result["teacher_bytes"]:
        assert held == pytest.approx(whole / 2, rel=0.01)
