"""The benchmarks of a step: contenders compute the same, a peer's checkout joins, tables hold."""

from __future__ import annotations

import csv
import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from launch import ROOT

BENCHMARKS = ROOT / "benchmarks"
ENGINE = ("zero0", "zero1", "zero2", "zero3")

# The names and arguments that the official code has, around a model of one layer.
DISTILLATION = """
from torch import nn
from .esvit import load_esvit

class FD(nn.Module):
    def __init__(self, config):
        super().__init__()
        swin = config.MODEL.SWIN
        assert config.MODEL.TYPE == "swin_v2" and swin.DEPTHS == [2, 2, 6, 2]
        self.teacher = load_esvit(config.DEV.PRED_FEAT, return_s3=config.DEV.PRED_FEAT_S3)
        self.teacher.requires_grad_(False)
        self.student = nn.Linear(3 * config.DATA.IMG_SIZE ** 2, swin.EMBED_DIM)

    def forward(self, x):
        return {"loss": self.student(x.flatten(1)).square().mean() + self.teacher.size.sum() * 0}

def build_fd(config):
    return FD(config)
"""
ESVIT = """
import torch
from torch import nn

class WarpperSwinTransformer(nn.Module):
    def __init__(self, img_size, embed_dim, window_size, num_classes, **others):
        super().__init__()
        assert (img_size, window_size, num_classes) == (64, 4, 0)
        self.size = nn.Parameter(torch.ones(embed_dim))

def load_esvit(name, return_s3=False):
    raise RuntimeError("would download weights")
"""
OPTIMIZER = """
import torch

def build_optimizer(config, model, logger, is_pretrain):
    assert is_pretrain and config.TRAIN.OPTIMIZER.NAME == "adamw"
    trained = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(trained, lr=config.TRAIN.BASE_LR)
"""


def run(program: str, *words: object, **environ: str) -> str:
    """Runs a benchmark to its end and returns what it said."""
    done = subprocess.run(
        [sys.executable, str(BENCHMARKS / program), *map(str, words)],
        env={**os.environ, "OMP_NUM_THREADS": "1", **environ},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-3000:]
    return done.stdout


@pytest.fixture
def peer(tmp_path: Path) -> Path:
    """A checkout with the official code's names."""
    folder = tmp_path / "Feature-Distillation"
    (folder / "models").mkdir(parents=True)
    (folder / "models/__init__.py").touch()
    (folder / "models/feature_distillation.py").write_text(DISTILLATION)
    (folder / "models/esvit.py").write_text(ESVIT)
    (folder / "optimizer.py").write_text(OPTIMIZER)
    return folder


@pytest.mark.sweep
def test_contenders_compute_the_same_and_a_peer_joins(tmp_path: Path, peer: Path) -> None:
    out = tmp_path / "found.json"
    said = run(
        *("throughput.py", "--quick", "--rounds", 2, "--width", 32, "--no-memory"),
        *("--precision", "float32", "--peer-repo", peer, "--out", out),
    )
    results = json.loads(out.read_text())
    rows = results["contenders"]
    assert set(rows) == {"alone", "ddp", "fsdp2", *ENGINE, "hpz", "peer"}
    before, after = rows["ddp"]["first_losses"]
    assert before != pytest.approx(after, rel=1e-4)
    for name in (*ENGINE, "hpz", "fsdp2"):
        assert rows[name]["first_losses"] == pytest.approx([before, after], rel=2e-5), name
    assert rows["alone"]["first_losses"][1] != pytest.approx(after, rel=2e-5)
    fastest = results["fastest"]
    assert fastest != "alone"  # Without exchange it is a bound.
    assert rows[fastest]["relative_speed"]["median"] == 1.0
    assert all(len(row["seconds"]["samples"]) == 2 for row in rows.values())
    timed = {name for name, row in rows.items() if "time_over_peer" in row}
    assert timed == {*ENGINE, "hpz"}
    assert results["ranks"] == 2
    # Where there is no GPU, fairscale's is left out, with the reason.
    assert "CUDA streams" in results["left_out"]["fairscale"]
    assert "left out: fairscale FSDP: fairscale's FSDP takes CUDA streams" in said
    lines = list(csv.DictReader(out.with_suffix(".csv").open()))
    speeds = [float(line["images_per_second"]) for line in lines]
    assert speeds == sorted(speeds, reverse=True)
    assert len(lines) == len(rows)
    assert out.with_suffix(".png").stat().st_size > 10_000

    # The table over node counts, from this run and one that was as fast on each of twice the ranks.
    twice = {**results, "ranks": 4, "nodes": 2, "contenders": {"ddp": dict(rows["ddp"])}}
    twice["contenders"]["ddp"]["images_per_second"] *= 1.5
    (tmp_path / "twice.json").write_text(json.dumps(twice))
    said = run("scaling.py", out, tmp_path / "twice.json", "--out", tmp_path / "scaling.csv")
    assert "(75%)" in said
    lines = list(csv.DictReader((tmp_path / "scaling.csv").open()))
    found = [float(line["efficiency"]) for line in lines if line["contender"] == "ddp"]
    assert found == pytest.approx([1.0, 0.75])


def test_a_folder_that_is_no_checkout_is_said_so(tmp_path: Path, monkeypatch) -> None:
    monkeypatch.syspath_prepend(BENCHMARKS)
    peer_module = importlib.import_module("peer")
    unavailable = importlib.import_module("contenders").Unavailable
    with pytest.raises(unavailable, match=r"peer-repo: .*feature_distillation\.py"):
        peer_module.build_peer(SimpleNamespace(peer_repo=tmp_path))


SRUN = """#!/bin/bash
echo "$@" >>"$SCRATCH/steps"
while (($#)); do
    [[ $1 == --out ]] && out=$2
    [[ $1 == --output=* ]] && log=${1#--output=}
    shift
done
[[ $out == *.json ]] && echo '{}' >"$out"
echo "the table" >"${log/\\%t/0}"
"""


def test_the_batch_script_doubles_the_nodes(tmp_path: Path) -> None:
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    environ = {
        "PATH": f"{tmp_path}{os.pathsep}{os.environ['PATH']}",
        "SCRATCH": str(tmp_path),
        "LOG_DIR": str(tmp_path / "logs"),
        "SLURM_SUBMIT_DIR": str(ROOT),
        "SLURM_JOB_ID": "7",
        "SLURM_JOB_NAME": "x",
        "SLURM_JOB_NUM_NODES": "6",
        "SLURM_NTASKS_PER_NODE": "4",
        "SLURM_CPUS_PER_TASK": "12",
        "PYTHON": "/env/python",
    }
    script = ["bash", str(ROOT / "slurm/throughput.sh"), "--model", "swinv2_base"]
    done = subprocess.run(script, env=environ, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr
    steps = (tmp_path / "steps").read_text().splitlines()
    folder = tmp_path / "logs/slurm-x-7"
    for step, (nodes, ranks) in zip(steps, [(1, 4), (2, 8), (4, 16), (6, 24)], strict=False):
        assert f"--nodes={nodes} --ntasks={ranks} --ntasks-per-node=4 " in step
        assert "--cpus-per-task=12 " in step
        words = f"benchmarks/throughput.py --model swinv2_base --as-rank --out {folder}"
        assert step.endswith(f"/env/python {words}/nodes_{nodes}.json")
    files = " ".join(f"{folder}/nodes_{nodes}.json" for nodes in (1, 2, 4, 6))
    assert steps[4].endswith(f"benchmarks/scaling.py {files} --out {folder}/scaling.csv")
    assert len(steps) == 5
    assert done.stdout.splitlines()[-1] == "the table"


@pytest.mark.sweep
@pytest.mark.parametrize("script", ["gpu.sh", "gpu_runs.sh", "gpu_kernels.sh"])
def test_every_line_of_the_scripts_for_gpus_runs_on_cpus(script: str) -> None:
    done = subprocess.run(
        ["bash", str(BENCHMARKS / script)],
        env={**os.environ, "FD_DRY_RUN": "1", "PYTHON": sys.executable},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-3000:]
    assert "no time left" not in done.stdout


@pytest.fixture
def gpu_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> ModuleType:
    monkeypatch.setenv("FD_BENCHMARK_RESULTS", str(tmp_path))
    monkeypatch.syspath_prepend(BENCHMARKS)
    return importlib.reload(importlib.import_module("gpu_rows"))


def stored_gpu_run(folder: Path, images_per_second: float, losses: list[float]) -> Path:
    (folder / "logs").mkdir(parents=True)
    (folder / "logs/rank_00000.log").write_text(
        "12:00 optimiser: AdamW of torch; not deepspeed's: no compiler\n"
        "12:00 residual_norm on cuda: triton (FD_KERNELS=auto)\n"
    )
    rows = [
        {"loss": loss, "images_per_second": images_per_second, "mfu": None, "memory_bytes": 2e9}
        for loss in losses
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    (folder / "metrics.jsonl").write_text(text + '{"loss": 1')  # The run was killed here.
    (folder / "profile").mkdir()
    calls = ["ProfilerStep#4", "ProfilerStep#5", *["cudaStreamSynchronize"] * 6]
    events = {"traceEvents": [{"name": name} for name in calls]}
    (folder / "profile/trace.json").write_text(json.dumps(events))
    return folder


def test_a_run_on_gpus_says_what_it_decides(
    gpu_rows: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    losses = [1.0, 0.9, 0.8, 0.7, 0.6]
    for name, rate, own_losses in (
        ("ViT-B_zero1", 300.0, losses),
        ("ViT-B_plain", 200.0, losses),
        ("ViT-B_zero3", 150.0, [1.0, 0.91, 0.8, 0.7, 0.6]),
        ("ViT-B_zero1_again", 300.0, [1.0, 0.9, 0.8, 0.7, 0.61]),
        ("ViT-B_teacher_stream", 295.0, losses),
    ):
        folder = stored_gpu_run(tmp_path / name, rate, own_losses)
        assert gpu_rows.main(name, folder, tmp_path / "log") == 0
    decided = [line for line in capsys.readouterr().out.splitlines() if "DECIDED" in line]
    assert "fused kernels for ViT-B: yes, 1.500" in decided[0]
    assert "ZeRO-3 for ViT-B: no, 0.500" in decided[1]
    assert "first 1 losses are equal" in decided[2]
    assert "first 5 losses are not equal" in decided[3]
    assert "teacher: as fast, 0.983" in decided[4]
    rows = json.loads((tmp_path / "gpu.json").read_text())["runs"]
    assert [len(row["chosen"]) for row in rows] == [2] * 5
    assert rows[0]["waits_per_step"]["cudaStreamSynchronize"] == 3
    # One that was to ask for too much; the reader of the figures goes on.
    assert gpu_rows.main("Swin-L_auto", tmp_path / "ViT-B_plain", tmp_path / "log") == 0
    assert gpu_rows.main("Swin-L_twice", tmp_path / "nowhere", tmp_path / "log") == 0
    assert "twice the micro batch that auto finds does not fit" in capsys.readouterr().out
    assert gpu_rows.main("Swin-L_twice", tmp_path / "ViT-B_zero1", tmp_path / "log") == 0
    assert "finds fits, at 1.500 of the images/s" in capsys.readouterr().out
    reason = "--optim.flag: unknown; got it, expected another. Leave it out."
    (tmp_path / "log").write_text(f"{reason}\nChildFailedError: fd_large\n=====\n")
    assert gpu_rows.main("Swin-B_fused", tmp_path / "nowhere", tmp_path / "log") == 1
    assert f"did not run: {reason}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("tensors", "held", "told"),
    [
        ([1, 9, 9, 9, 2, 3, 3, 2], [1, 9, 9, 9, 4, 4, 4, 4], "stays: +0.0%"),
        ([1, 9, 9, 9, 2, 3, 5, 7], [1, 9, 9, 9, 4, 4, 6, 8], "grows: +100.0%"),
    ],
)
def test_memory_that_grows_is_told(
    tensors: list[int],
    held: list[int],
    told: str,
    gpu_rows: ModuleType,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    samples = [*zip(range(len(held)), tensors, held, strict=True)]
    # What a start holds does not count.
    text = "".join(f"{json.dumps(sample)}\n" for sample in samples)
    (tmp_path / "HTC.memory").write_text(text)
    folder = stored_gpu_run(tmp_path / "run", 1.0, [1.0] * 5)
    assert gpu_rows.main("HTC", folder, tmp_path / "HTC.log") == 0
    assert f"the memory of HTC {told}" in capsys.readouterr().out
