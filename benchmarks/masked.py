"""How much time does a student save by encoding visible patches alone?

    python benchmarks/masked.py [--quick] [--width 192] [--ratio 0.75]

It runs forward and backward of FD's ViT with its head and loss, 196 patches per image, on one core.
Four cases take turns: whole images, mask tokens, visible patches alone, and visible patches with a
decoder. The teacher's map is an input, so that only the student is timed. The results are ratios of
the processor time of whole images to that of a case in the same round; other work on the machine
changes processor time less than wall time. Writes
benchmarks/results/masked.json.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

import harness
from harness import RESULTS

DROPPED = {"sampler": "random", "student": "dropped"}
CASES: dict[str, dict[str, Any]] = {
    "whole images": {},
    "mask tokens": {"sampler": "random"},
    "visible patches": {**DROPPED, "tokens": "visible", "cls": True},
    "visible patches, decoder": DROPPED,
}


def parse() -> argparse.Namespace:
    """Returns the parsed flags of the command line."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="few rounds of a narrow model")
    parser.add_argument("--width", type=int, default=192, help="channels of the ViT of 12 blocks")
    parser.add_argument("--ratio", type=float, default=0.75, help="share of hidden patches")
    parser.add_argument("--images", type=int, default=4, help="images of a micro batch")
    parser.add_argument("--rounds", type=int, default=6, help="measured steps of each")
    parser.add_argument("--out", type=Path, default=RESULTS / "masked.json")
    return harness.parse(parser, quick={"width": 64, "rounds": 2, "images": 2})


def made(case: dict[str, Any], flags: argparse.Namespace) -> tuple[Any, dict[str, Any]]:
    """Returns the task (student, head and loss) of a case, and the arguments of its forward.

    Args:
        case: Fields of the recipe's section `mask`.
        flags: The flags.
    """
    import torch

    from fd_large.backbones.feature_map import FeatureMap
    from fd_large.engine.student import make_student
    from fd_large.recipes.architectures import Architecture
    from fd_large.recipes.sections import Student
    from fd_large.tasks.distillation.job import composed, sight_of
    from fd_large.tasks.distillation.objective import make_target
    from fd_large.tasks.distillation.section import Mask

    fields = {"embed_dim": flags.width, "num_heads": (max(1, flags.width // 64),)}
    student = Student(model="vit_base_patch16", architecture=Architecture(**fields))
    net = make_student(student, image_size=224)
    decoder = {"decoder_width": max(16, flags.width * 2 // 3 // 16 * 16)}
    sight = sight_of(Mask(**case, ratio=flags.ratio, **decoder), net, 224)
    task = composed(net, {}, [make_target(sight.width(net), 768)], sight=sight).train()
    drawn = task.draws(0, 0, torch.arange(flags.images))
    tokens = torch.randn(flags.images, 197, 768)
    pixels = torch.randn(flags.images, 3, 224, 224)
    maps = {"": FeatureMap(tokens, (14, 14), 1)}
    return task, {"pixels": pixels, "keep": None, "maps": maps, "drawn": drawn}


def main() -> int:
    """Times all cases in turns, prints and writes the results; returns the exit code."""
    import torch

    flags = parse()
    torch.set_num_threads(1)
    tasks = {name: made(case, flags) for name, case in CASES.items()}
    seconds: dict[str, list[float]] = {name: [] for name in tasks}
    for turn, names in enumerate(harness.turns(list(tasks), flags.rounds + 1)):
        for name in names:
            task, batch = tasks[name]
            task.zero_grad()
            begin = time.process_time()
            task(**batch)[0].backward()
            if turn:  # The first round warms up.
                seconds[name].append(time.process_time() - begin)
    whole = seconds["whole images"]
    faster = {name: harness.paired(whole, times) for name, times in seconds.items()}
    for name, times in seconds.items():
        low, high = faster[name]["quartiles"]
        print(
            f"{name}: {1e3 * harness.spread(times)['median'] / flags.images:.0f} ms of the "
            f"processor an image, {faster[name]['median']:.2f} times as fast as whole images "
            f"({low:.2f} to {high:.2f})"
        )
    results = harness.conditions(__file__, __doc__)
    harness.write({**results, "seconds": seconds, "faster": faster}, flags.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
