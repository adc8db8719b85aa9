"""Reports the measurements of a training run of gpu.sh or gpu_runs.sh, and decides questions.

    python benchmarks/gpu_rows.py NAME RUN_FOLDER LOG

It prints a line for the run, and a line for each question that the run answers together with an
earlier run, and adds the run to the results of its script, gpu.json or gpu_runs.json.
Exit code 1 if the run made no step.
"""

from __future__ import annotations

import gzip
import json
import os
import re
import statistics
import sys
from collections import Counter
from pathlib import Path
from typing import Any

RESULTS = Path(os.environ.get("FD_BENCHMARK_RESULTS") or Path(__file__).parent / "results")
# Steps that count for nothing: kernels are compiled in them.
FIRST = 3
# Medians of a few steps that differ by less decide nothing.
SAME_SPEED = 0.03
RATES = ("images_per_second", "mfu", "hardware_utilisation", "data_wait")
WAITS = ("cudaDeviceSynchronize", "cudaStreamSynchronize", "cudaEventSynchronize")
# A run, the one that it is set against, and what is done where the first is the faster.
QUESTIONS = (
    ("ViT-B_zero3", "ViT-B_zero1", "ZeRO-3 for ViT-B"),
    ("ViT-B_zero1", "ViT-B_plain", "fused kernels for ViT-B"),
    ("Swin-B_fused", "Swin-B_plain", "fused kernels for Swin-B"),
    ("G_keeps_all", "G_every_block", "SwinV2-G without checkpoints"),
    ("G_every_block", "G_every_block_plain", "fused kernels for SwinV2-G"),
    ("G_zero3", "G_every_block", "ZeRO-3 for SwinV2-G"),
    ("G_zero3_hpz", "G_zero3", "hpZ for SwinV2-G"),
    ("ViT-B_zero3", "ViT-B_clock", "DeepSpeed's clock off"),
    ("twin_contiguous", "twin", "contiguous gradients"),
    ("ViT-B_teacher_stream", "ViT-B_zero1", "a stream of its own for the teacher"),
)
# Pairs whose losses should have the same bits: of all steps, or of the first.
SAME = (
    ("ViT-B_clock", "ViT-B_zero3", None),
    ("ViT-B_unordered", "ViT-B_zero3", None),
    ("twin_contiguous", "twin", None),
    ("ViT-B_zero1_again", "ViT-B_zero1", None),
    ("ViT-B_zero3", "ViT-B_zero1", 1),
)
# A run with the micro batch that was found, and one with twice as many images.
PROBED, TWICE = "Swin-L_auto", "Swin-L_twice"
# Runs whose memory is to stay as it is, and by how much it may differ.
STEADY, GROWTH = ("HTC", "UPerNet"), 0.05


def measured(name: str, folder: Path, log: Path) -> dict[str, Any]:
    """Returns the measurements of a run, or the reason why it failed.

    Args:
        name: Name of the run.
        folder: Folder of the run.
        log: File with the output of the run's process.
    """
    metrics, ranks_log = folder / "metrics.jsonl", folder / "logs/rank_00000.log"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    steps = []
    for line in lines:
        try:
            steps.append(json.loads(line))
        except ValueError:
            break  # The run was killed while it wrote.
    steps = [step for step in steps if "loss" in step]
    row: dict[str, Any] = {"run": name, "updates": len(steps)}
    text = ranks_log.read_text(errors="replace") if ranks_log.exists() else ""
    # Which AdamW, which kernels, and those that were given up.
    choices = re.findall(r"(?:optimi[sz]er: |\S+ on \w+: |\S+: its kernel |kernels agree).*", text)
    row["chosen"] = list(dict.fromkeys(choices))
    if len(steps) <= FIRST:
        output = log.read_text(errors="replace").splitlines() if log.exists() else []
        # A launcher says more after a rank's own sentence.
        reasons = [line for line in output if "; got " in line or "Error: " in line]
        return row | {"failed": (reasons or output[-1:] or ["no output"])[0][:200]}
    row["losses"] = [step["loss"] for step in steps]
    for key in RATES:
        values = [step[key] for step in steps[FIRST:] if step.get(key) is not None]
        row[key] = statistics.median(values) if values else None
    row["memory_gigabytes"] = steps[-1]["memory_bytes"] / 1e9
    return row | memory(log.with_suffix(".memory")) | waits(folder / "profile")


def memory(file: Path) -> dict[str, Any]:
    """Returns figures on memory that torch's allocator reserved but did not need.

    Only the second half of the samples counts, since models are built in the first half.

    Args:
        file: The samples of gpu_train.py, a line for each: [seconds, allocated bytes, reserved
            bytes].

    Returns: `held_in_vain_gigabytes`, which is the last reserved number less the largest allocated
        one, in GB; and `memory_growth`, by which the largest reserved number grows from the first
        half of these samples to the second, as a fraction. {} if there are too few samples.
    """
    if not file.exists():
        return {}
    samples = [json.loads(line) for line in file.read_text().splitlines()]
    # Between a start and its steps models are built and kernels tried.
    samples = samples[len(samples) // 2 :]
    if len(samples) < 4:
        return {}
    reserved = [sample[2] for sample in samples]
    most, middle = max(sample[1] for sample in samples), len(samples) // 2
    return {
        "held_in_vain_gigabytes": (reserved[-1] - most) / 1e9,
        "memory_growth": max(reserved[middle:]) / max(1, *reserved[:middle]) - 1,
    }


def waits(folder: Path) -> dict[str, Any]:
    """Returns how often the host waits for the GPU in a step that torch's profiler has traced.

    Args:
        folder: Folder of the trace.

    Returns: {"waits_per_step": {name of a CUDA call that waits: number of calls per step}}, or {}
        if the folder has no trace.
    """
    traces = [path for path in folder.glob("*") if path.name.endswith((".json", ".json.gz"))]
    traces = [path for path in traces if path.name != "communication.json"]
    if not traces:
        return {}
    data = traces[0].read_bytes()
    if traces[0].suffix == ".gz":
        data = gzip.decompress(data)
    events = json.loads(data)["traceEvents"]
    counted = Counter(event.get("name") for event in events)
    steps = len({e["name"] for e in events if str(e.get("name")).startswith("ProfilerStep")}) or 1
    return {"waits_per_step": {call: counted[call] / steps for call in WAITS}}


def shown(row: dict[str, Any]) -> str:
    """Returns the line that is printed for a run.

    Args:
        row: The result of `measured`.
    """
    if "failed" in row:
        return f"{row['run']:24} did not run: {row['failed']}"
    shares = (f"{key} {'-' if row[key] is None else format(row[key], '.1%')}" for key in RATES[1:])
    vain = row.get("held_in_vain_gigabytes")
    vain = "" if vain is None else f", {vain:.1f} GB held in vain"
    host = "".join(f", {count:g} {call}" for call, count in row.get("waits_per_step", {}).items())
    return (
        f"{row['run']:24} {row['images_per_second']:.1f} images/s, {', '.join(shares)}, "
        f"{row['memory_gigabytes']:.1f} GB{vain}{host and ' | a step:' + host[1:]}"
    )


def decisions(rows: dict[str, dict[str, Any]], newest: str) -> list[str]:
    """Returns a line for each question that the newest run answers together with an earlier run.

    Args:
        rows: The results of all runs, by the run's name.
        newest: Name of the newest run.
    """
    lines = []
    for name, other, question in QUESTIONS:
        pair = [rows.get(name, {}), rows.get(other, {})]
        if newest not in (name, other) or not all(row.get("images_per_second") for row in pair):
            continue
        ratio = pair[0]["images_per_second"] / pair[1]["images_per_second"]
        verdict = "as fast" if abs(ratio - 1) <= SAME_SPEED else "yes" if ratio > 1 else "no"
        lines.append(f"DECIDED: {question}: {verdict}, {ratio:.3f} of the images/s of {other}")
    for name, other, steps in SAME:
        losses = [rows.get(run, {}).get("losses") for run in (name, other)]
        if newest in (name, other) and all(losses):
            count = min(steps or len(losses[0]), len(losses[0]), len(losses[1]))
            equal = losses[0][:count] == losses[1][:count]
            lines.append(
                f"DECIDED: {name} and {other}: the first {count} losses are "
                f"{'equal to the last digit' if equal else 'not equal'}"
            )
    alone = rows.get(newest, {})
    if newest == TWICE and PROBED in rows:
        ratio = alone.get("images_per_second", 0) / (rows[PROBED].get("images_per_second") or 1)
        fits = f"fits, at {ratio:.3f} of the images/s" if "failed" not in alone else "does not fit"
        lines.append(f"DECIDED: twice the micro batch that auto finds {fits}")
    if newest in STEADY and "memory_growth" in alone:
        grown = alone["memory_growth"]
        verdict = "grows" if grown > GROWTH else "stays"
        lines.append(f"DECIDED: the memory of {newest} {verdict}: {grown:+.1%} in its second half")
    return lines


def main(name: str, folder: Path, log: Path) -> int:
    """Adds a run to the results and prints its lines; returns 1 if the run failed, else 0."""
    script = os.environ.get("FD_GPU_SCRIPT", "gpu")
    out = RESULTS / f"{script}.json"
    rows = json.loads(out.read_text())["runs"] if out.exists() else []
    row = measured(name, folder, log)
    # A row of an earlier session would be another machine's.
    session = os.environ.get("FD_GPU_SESSION", "")
    rows = [r for r in rows if r.get("session", "") == session and r["run"] != name]
    rows.append(row | {"session": session})
    result = {"command": f"bash benchmarks/{script}.sh", "runs": rows}
    out.write_text(json.dumps(result, indent=1) + "\n")
    print(shown(row))
    for line in decisions({r["run"]: r for r in rows}, name):
        print(line)
    # More than fits is asked for once.
    return 1 if "failed" in row and name != TWICE else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], *map(Path, sys.argv[2:4])))
