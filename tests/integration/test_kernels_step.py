"""ZeRO-3 on two ranks with the Triton kernels, and with compiled blocks, against plain torch."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
from closeness import distance
from launch import read_results, run_ranks

PROGRAM = Path(__file__).parent / "programs" / "scenarios.py"
sys.path.insert(0, str(PROGRAM.parent))

import scenarios  # noqa: E402


def net(**fields: Any) -> dict[str, Any]:
    # As small as the kernels take: windows of 4, heads of 32. Hooks leave many small graphs of a
    # compiled block, each of which takes a second; the interpreter takes as long for a block.
    shape = {"embed_dim": 32, "depths": [1], "num_heads": [1], "window_size": 4}
    return {"architecture": shape | fields}


RUN = {
    "student": net(extra_norm_every=1),
    "teacher": net(),
    "data": {"image_size": 32},
    "batch": {"global_batch_size": 4, "micro_batch_size": 2},
}


@pytest.fixture(scope="module")
def plain() -> list[float]:
    # The second loss shows the first gradients.
    return scenarios.plain_losses(scenarios.tiny_run(**RUN), 3)


def results(
    program: Path, setting: dict[str, Any], folder: Path, env: dict[str, str]
) -> tuple[list[dict[str, Any]], list[str]]:
    (folder / "scenarios.json").write_text(json.dumps(setting))
    done = run_ranks(program, folder, ranks=2, timeout=170, results=folder, env=env, forked=not env)
    return read_results(folder, 2), done.outputs


@pytest.mark.closeness
def test_compiled_blocks(plain: list[float], tmp_path: Path) -> None:
    compiled = {**RUN, "engine": {"compile": "blocks"}}
    setting = {"zero3": {"run": compiled, "zero": scenarios.ZERO3, "updates": 2}}
    for result in results(PROGRAM, setting, tmp_path, {})[0]:
        assert distance(result["zero3"]["losses"], plain[:2]) <= 1e-5
    assert plain[1] != pytest.approx(plain[0], rel=1e-3)


@pytest.mark.closeness
def test_triton_kernels_and_one_that_is_wrong_on_one_rank_and_replaced_on_all(
    plain: list[float], tmp_path: Path
) -> None:
    """Two steps on the kernels; the check of a start, which gives one up; a step without it."""
    pytest.importorskip("triton")
    found, outputs = results(
        PROGRAM.with_name("checked_kernels.py"),
        {"run": RUN, "zero": scenarios.ZERO3},
        tmp_path,
        {"FD_KERNELS": "triton", "TRITON_INTERPRET": "1"},
    )
    for result in found:
        assert result["refused"].keys() == {"window_attention"}
        assert distance(result["losses"], plain) <= 1e-5
    for said in outputs:
        assert "window_attention: its kernel differs from its reference on rank 1" in said
        assert "agree with their references: layer_norm, residual_norm" in said
        for op in ("layer_norm", "residual_norm", "window_attention"):
            assert f"{op} on cpu: triton (interpreted)" in said
