"""ZeRO-3 on two ranks with the Triton kernels, and with compiled blocks, against plain torch."""

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


def net(**fields: Any) -> dict[str, Any]:
    # As small as the kernels take: windows of 4, heads of 32.
    shape = {"embed_dim": 32, "depths": [2, 1], "num_heads": [1, 2], "window_size": 4}
    return {"architecture": shape | fields}


RUN = {
    "student": net(extra_norm_every=2),
    "teacher": net(depths=[1, 1]),
    "data": {"image_size": 32},
    "batch": {"global_batch_size": 4, "micro_batch_size": 2},
}


@pytest.fixture(scope="module")
def plain() -> list[float]:
    # The second loss shows the first gradients.
    return scenarios.plain_losses(scenarios.tiny_run(**RUN), 2)


def check(run: dict[str, Any], env: dict[str, str], plain: list[float], folder: Path) -> str:
    scenario = {"run": run, "zero": scenarios.ZERO3, "updates": len(plain)}
    (folder / "scenarios.json").write_text(json.dumps({"zero3": scenario}))
    done = run_ranks(PROGRAM, folder, ranks=2, timeout=170, results=folder, env=env, forked=not env)
    for result in read_results(folder, 2):
        assert result["zero3"]["losses"] == pytest.approx(plain, rel=1e-5)
    assert plain[-1] != pytest.approx(plain[0], rel=1e-3)
    return done.outputs[0]


def test_triton_kernels(plain: list[float], tmp_path: Path) -> None:
    pytest.importorskip("triton")
    said = check(RUN, {"FD_KERNELS": "triton", "TRITON_INTERPRET": "1"}, plain, tmp_path)
    for op in ("layer_norm", "residual_norm", "window_attention"):
        assert f"{op} on cpu: triton (interpreted)" in said
    assert "whitened_loss on cpu: reference (plain on CPUs)" in said
    assert said.count("reference") == 1


def test_compiled_blocks(plain: list[float], tmp_path: Path) -> None:
    check({**RUN, "engine": {"compile": "blocks"}}, {}, plain, tmp_path)


def test_a_wrong_kernel_on_one_rank_is_replaced_on_all(tmp_path: Path) -> None:
    pytest.importorskip("triton")
    run = RUN | {"student": net(depths=[1, 1]), "teacher": net(depths=[1, 1])}
    plain = scenarios.plain_losses(scenarios.tiny_run(**run), 1)
    scenario = {"run": run, "zero": scenarios.ZERO3}
    (tmp_path / "scenarios.json").write_text(json.dumps(scenario))
    done = run_ranks(
        PROGRAM.with_name("checked_kernels.py"),
        tmp_path,
        ranks=2,
        timeout=170,
        results=tmp_path,
        env={"FD_KERNELS": "triton", "TRITON_INTERPRET": "1"},
        forked=False,
    )
    for result in read_results(tmp_path, 2):
        assert result["refused"].keys() == {"window_attention"}
        assert result["loss"] == pytest.approx(plain[0], rel=1e-5)
    for said in done.outputs:
        assert "window_attention: its kernel is off its reference on rank 1" in said
        assert "agree with their references: layer_norm, residual_norm" in said
