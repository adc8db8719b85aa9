"""What does soft-NMS cost beside torchvision's hard one, and is it the plain loop's?

    python benchmarks/soft_nms.py [--boxes N] [--rounds N] [--out FILE]

Boxes of made-up objects with scores of 80 classes, as a trained detector gives them: high for the
object's class, and pairs of a box and a class with a score up to 0.001 left out. Both functions
take the same pairs on the GPU, or on the CPU where there is none. `plain` is the loop of the
definition, class by class, which is compared but not timed.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path

from harness import RESULTS, ROOT, conditions, paired, spread, turns, write

sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torchvision.ops import batched_nms, box_iou  # noqa: E402

from fd_large.tasks.detection.heads.soft_nms import soft_nms  # noqa: E402

CLASSES, OBJECTS, AT_MOST, IOU, LEAST = 80, 60, 100, 0.5, 1e-3


def pairs(boxes: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Makes boxes (N, 4), scores (N,) and labels (N,) of pairs of a box and a class."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    centre = 1000 * torch.rand(OBJECTS, 2, generator=generator)
    side = 30 + 200 * torch.rand(OBJECTS, 2, generator=generator)
    of = torch.randint(OBJECTS, (boxes,), generator=generator)
    around = centre[of] + 0.15 * side[of] * normal(boxes, 2)
    half = side[of] * torch.exp(0.2 * normal(boxes, 2)) / 2
    logits = 1.5 * normal(boxes, CLASSES + 1)
    logits[torch.arange(boxes), of % CLASSES] += 5 * torch.rand(boxes, generator=generator)
    logits[:, CLASSES] += 6 * torch.rand(boxes, generator=generator)
    scores = logits.softmax(1)[:, :CLASSES]
    row, label = torch.where(scores > LEAST)
    all_boxes = torch.cat([around - half, around + half], dim=1)
    return all_boxes[row].to(device), scores[row, label].to(device), label.to(device)


def plain(boxes: Tensor, scores: Tensor, labels: Tensor, decay: str) -> list[tuple[float, int]]:
    """Chooses class by class, box after box; returns scores and numbers, best first."""
    found = []
    for label in labels.unique():
        numbers = torch.where(labels == label)[0]
        here, left = boxes[numbers], scores[numbers].clone()
        while len(left) and left.max() >= LEAST:
            best = int(left.argmax())
            found.append((float(left[best]), int(numbers[best])))
            overlap = box_iou(here[best][None], here)[0]
            gaussian = torch.exp(-(overlap**2) / 0.5)
            left = left * (
                gaussian if decay == "gaussian" else torch.where(overlap >= IOU, 1 - overlap, 1)
            )
            left[best] = 0
            stays = left >= LEAST
            numbers, here, left = numbers[stays], here[stays], left[stays]
    return sorted(found, reverse=True)[:AT_MOST]


def main() -> int:
    """Compares, times in turns, and writes."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--boxes", type=int, default=5000)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--out", type=Path, default=RESULTS / "soft_nms.json")
    given = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = pairs(given.boxes, device)
    contenders: dict[str, Callable[[], object]] = {
        "linear": lambda: soft_nms(*found, at_most=AT_MOST, decay="linear"),
        "gaussian": lambda: soft_nms(*found, at_most=AT_MOST, decay="gaussian"),
        "batched_nms": lambda: batched_nms(*found, IOU)[:AT_MOST],
    }
    differences = {}
    for decay in ("linear", "gaussian"):
        expected = plain(*(part.cpu() for part in found), decay)
        numbers, scores = contenders[decay]()  # type: ignore[misc]
        assert numbers.tolist() == [number for _, number in expected], decay
        differences[decay] = max(
            abs(score - got) for (score, _), got in zip(expected, scores.tolist(), strict=True)
        )
    seconds: dict[str, list[float]] = {name: [] for name in contenders}
    for order in turns(list(contenders), given.rounds):
        for name in order:
            if device.type == "cuda":
                torch.cuda.synchronize()
            begin = time.perf_counter()
            contenders[name]()
            if device.type == "cuda":
                torch.cuda.synchronize()
            seconds[name].append(time.perf_counter() - begin)
    results = {
        **conditions(__file__, __doc__, ("torch", "torchvision")),
        "pairs": len(found[1]),
        "largest_difference_from_the_plain_loop": differences,
        "seconds": {name: spread(samples) for name, samples in seconds.items()},
        "times_of_batched_nms": {
            name: paired(seconds[name], seconds["batched_nms"]) for name in ("linear", "gaussian")
        },
    }
    write(results, given.out)
    print(f"{len(found[1]):,} pairs; times of batched_nms:")
    for name, ratio in results["times_of_batched_nms"].items():
        print(f"  {name}: {ratio['median']:.2f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
