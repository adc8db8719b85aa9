"""Every figure in the tables of README and benchmarks/README is that of its results file."""

from __future__ import annotations

import json
import re
from pathlib import Path
from statistics import median

import pytest

ROOT = Path(__file__).resolve().parents[2]


def result(name: str) -> dict:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def row(beginning: str) -> str:
    """The row of one of the tables, which names no unit of another figure."""
    pages = "".join((ROOT / page).read_text() for page in ("README.md", "benchmarks/README.md"))
    (found,) = re.findall(rf"^\| {re.escape(beginning)}.*$", pages, re.M)
    return found


def speed(contenders: dict, ours: str, theirs: str) -> str:
    """How many times as fast as another a contender is: the median over rounds."""
    ours, theirs = (contenders[name]["seconds"]["samples"] for name in (ours, theirs))
    return f"{median(b / a for a, b in zip(ours, theirs, strict=True)):.2f}"


def gigabytes(number: float) -> str:
    return f"{number / 1e9:.2f} GB"


def test_images_per_second():
    one = result("throughput_1_float32")["contenders"]
    assert f"| {speed(one, 'zero0', 'alone')} times |" in row("images per second, one rank")
    two = result("throughput_2_float32")
    for ours, theirs, beginning in (("zero3", "fsdp2", "ZeRO-3"), ("zero1", "ddp", "ZeRO-1")):
        large, small = (speed(x["contenders"], ours, theirs) for x in (two, two["small_step"]))
        said = row(f"images per second, {beginning}")
        assert f"| {large} times, on small steps {small}" in said


def test_three_billion_parameters():
    found, said = result("true_size_swinv2_giant"), row("SwinV2-G trains")
    assert f"{found['most_anonymous_bytes'] / 1e9:.0f} GB that cannot" in said
    places = found["bytes_between_steps"]["tensors"]
    on_disk = places["on disk"] + places["teacher's file"]
    assert f"{on_disk / 1e9:.0f} GB of disk" in said
    seconds = [
        part["seconds"]
        for part in found["parts"]
        if part["part"] in ("teacher, forward, backward", "optimiser step")
    ]
    assert len(seconds) == 2 * len(found["steps"]) == 6, "three steps"
    assert f"{sum(seconds) / 3 / 60:.0f} minutes a step" in said


def test_memory_of_loading():
    loads, said = result("load_weights")["loads"], row("memory of one of two ranks")
    ours, theirs = (
        [gigabytes(loads[who][f"weights.{file}"]["peak_bytes"]) for file in ("safetensors", "pth")]
        for who in ("fd_large", "naive")
    )
    assert f"| {ours[0]} (safetensors), {ours[1]} (.pth) |" in said
    assert f"| {theirs[0]} and {theirs[1]} where" in said
    assert f"{result('load_weights')['parameters'] / 1e6:.0f}M" in said


def test_checkpoints_images_and_kills():
    waits = result("checkpoint")["stall_relative_to"]["deepspeed"]["median"]
    assert f"| {waits:.2f} times as long |" in row("time that training waits")
    pipelines = result("data_pipeline")["pipelines"]
    folder, tar = (
        f"{pipelines[f'fd_large, {name}']['ratio_to_pil']:.2f}"
        for name in ("folder", "tar in place")
    )
    said = row("images decoded and cropped per core")
    assert f"| {folder} times (folder), {tar} (tar) |" in said
    assert len(pipelines["fd_large, folder"]["samples"]) == 3
    assert f"killed {result('kills')['kills']} times" in row("a run that is killed")


def test_the_ablation():
    """docs/evaluation.md has the accuracies, rates and differences of the results file."""
    page = " ".join((ROOT / "docs/evaluation.md").read_text().split())
    found = result("proof")["found"]
    for tuned in found["finetune"].values():
        assert f"| {tuned['mean']:.2f} +- {tuned['standard_deviation']:.2f} |" in page
    order = ("teacher", "student", "same_positions", "drop_path", "labels", "teacher_longer")
    sweeps = [found["finetune"][name]["sweep"] for name in (*order, "whitened", "raw")]
    for rate in (0.002, 0.004, 0.008):
        cells = [
            f"{trial['held_out_accuracy']:.1f}"
            for sweep in sweeps
            for trial in sweep["trials"]
            if trial["base_lr"] == pytest.approx(rate)
        ]
        assert f"| {rate} | {' | '.join(cells)} |" in page.replace("**", "")
    for gap in found["differences"]:
        low, high = gap["interval"]
        sign = "+" if low > 0 else ""
        upper = f"{high:.2f}"
        assert f"{gap['mean']:+.2f}, {sign}{low:.2f} to {upper}" in page, gap["what"]
        assert gap["over"] == "images and seeds"
