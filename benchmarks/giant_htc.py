"""How much memory does one forward of HTC++ on SwinV2-G take, at its true size, in bfloat16?

    python benchmarks/giant_htc.py [--quick] [--side 768]

The detector of `coco_htc_swinv2_giant`, 3.2 billion parameters with random weights, looks at one
made-up image on the CPU: backbone, layer of attention, pyramid, proposals, three stages of boxes
and masks, semantic branch, soft-NMS. `--quick` is a narrow backbone. Recorded are parameters, peak
memory while it is built and in the forward, seconds, and how large the numbers are. A forward in
evaluation keeps no activations. Writes benchmarks/results/giant_htc.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import replace
from pathlib import Path

import harness
import torch
from harness import RESULTS, ROOT
from torch import nn

sys.path.insert(0, str(ROOT))
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture
from fd_large.tasks.detection.job import DetectionJob

RECIPE = "coco_htc_swinv2_giant"
NARROW = Architecture(embed_dim=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=8)


def parse() -> argparse.Namespace:
    """Reads the flags."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a narrow backbone, 256 px")
    parser.add_argument("--side", type=int, default=768, help="side of the image, in pixels")
    parser.add_argument("--json", type=Path, default=RESULTS / "giant_htc.json")
    return parser.parse_args()


def peak_bytes(*, forget: bool = False) -> int:
    """Returns the most memory that this process has held since the peak was last forgotten."""
    if forget:
        Path("/proc/self/clear_refs").write_text("5")
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))


def to_bfloat16(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
    """Makes a parameter bfloat16 before it is filled, so that no float32 model is ever held."""
    return nn.Parameter(parameter.data.bfloat16())


def main(flags: argparse.Namespace) -> None:
    """Builds, looks, and writes the results."""
    run, side = registry.get(RECIPE), 256 if flags.quick else flags.side
    if flags.quick:
        run = replace(run, student=replace(run.student, architecture=NARROW))
    run = replace(run, data=replace(run.data, image_size=side))
    torch.manual_seed(0)
    begin = time.perf_counter()
    hook = nn.modules.module.register_module_parameter_registration_hook(to_bfloat16)
    task = DetectionJob(run).make_task().eval()
    hook.remove()
    for module in task.modules():
        if hasattr(module, "cast_buffers"):
            module.cast_buffers(torch.bfloat16)
    parameters = sum(parameter.numel() for parameter in task.parameters())
    built, build_peak = time.perf_counter() - begin, peak_bytes()
    print(
        f"{parameters / 1e9:.2f}e9 parameters, {built:.0f} s, {build_peak / 1e9:.1f} GB", flush=True
    )

    largest: dict[str, float] = {}

    def note(name: str, answer: object) -> None:
        levels = answer if isinstance(answer, (list, tuple)) else [answer]
        largest[name] = max(float(level.abs().max()) for level in levels)

    for name in ("attention", "pyramid"):
        task.get_submodule(name).register_forward_hook(
            lambda module, given, answer, name=name: note(name, answer)
        )
    held = peak_bytes(forget=True)
    images = torch.randint(0, 256, (1, 3, side, side), dtype=torch.uint8)
    begin = time.perf_counter()
    with torch.no_grad():
        (seen,) = task.see(images, torch.tensor([[side, side]]))
    seconds = time.perf_counter() - begin
    record = {
        **harness.conditions(__file__, __doc__),
        "recipe": RECIPE,
        "side": side,
        "dtype": "bfloat16",
        "threads": torch.get_num_threads(),
        "parameters": parameters,
        "build": {"seconds": round(built), "peak_bytes": build_peak},
        "forward": {
            "seconds": round(seconds),
            "held_bytes_before": held,
            "peak_bytes": peak_bytes(),
        },
        "seen": {
            "boxes": len(seen.boxes),
            "masks": list(seen.masks.shape),
            "all_finite": bool(seen.boxes.isfinite().all() and seen.masks.isfinite().all()),
            "largest_magnitude": largest,
        },
    }
    harness.write(record, flags.json)
    print({key: record[key] for key in ("parameters", "build", "forward", "seen")})


if __name__ == "__main__":
    main(parse())
