"""How far is a step whose loss depends on all its images from the same step on other ranks?

    python benchmarks/teacher_choice.py [--images N] [--steps N] [--out FILE]

The published codes of UNIC (modeling/teacher_dropping.py) and DUNE (model/teacher_dropping.py)
weight a pair of image and teacher by mask / sum(mask) on each rank by itself, and torch's DDP
averages the ranks. This package divides by the number that the whole step keeps. Both are computed
here for the same losses and the same masks, with the images of a step dealt to 1, 2, 4 ... ranks:
a linear student learns four teachers of 16 channels by half cosine and half smooth L1, and each
step's loss and gradient are compared with those on one rank.

So does a loss against a queue of earlier summaries: in lightly-train each rank has a queue of its
own images, here the run has one. Statistics of targets need no row: the codes of UNIC and DUNE
gather them over all ranks.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from harness import RESULTS, ROOT, conditions, spread, write

sys.path[:0] = [str(ROOT)]

import torch  # noqa: E402
from torch import Tensor  # noqa: E402

from fd_large.tasks.distillation.losses import make_loss  # noqa: E402
from fd_large.tasks.distillation.several.similarity import pushed, queue_divergence, units  # noqa: E402
from fd_large.tasks.distillation.several.weighting import (  # noqa: E402
    coins,
    kept_beside_worst,
    kept_of_own_data,
    weighted_loss,
)

TEACHERS, WIDTH, CHANNELS = 4, 32, 16
QUEUE, FILLED = 256, 40
"""Summaries in a queue, and steps that fill it before the first, with 8 images of each too."""
# Every image of the first dataset has all teachers, as generic data in DUNE; others have their own.
TEACHES = torch.eye(TEACHERS, dtype=torch.bool)
TEACHES[:, 0] = True


def published(losses: Tensor, kept: Tensor) -> Tensor:
    """The loss of a rank in the published codes."""
    return (losses * kept / kept.sum()).sum()


class Steps:
    """Steps of a student, whose loss and gradient can be taken on any number of ranks.

    Args:
        images: Images of a step.
    """

    def __init__(self, images: int) -> None:
        self._images = images
        self._generator = torch.Generator().manual_seed(0)
        self._truth = torch.randn(WIDTH, TEACHERS * CHANNELS, generator=self._generator)
        self.weight = torch.zeros_like(self._truth).normal_(generator=self._generator) / WIDTH
        self.weight.requires_grad_()
        self._loss = make_loss("0.5 cosine + 0.5 smooth_l1", beta=1.0)
        self._earlier: list[Tensor] = []

    def draw(self, number: int, rule: str) -> None:
        """Makes the images of step `number`, and what chooses their teachers."""
        if number:
            self._earlier.append(self._targets)
        self._inputs = torch.randn(self._images, WIDTH, generator=self._generator)
        clean = self._inputs @ self._truth / WIDTH**0.5
        # Some teachers are harder to learn than others.
        noise = torch.randn(clean.shape, generator=self._generator).view(-1, TEACHERS, CHANNELS)
        noise = noise * torch.tensor([0.2, 0.5, 1.0, 2.0])[:, None]
        self._targets = clean + noise.flatten(1)
        positions = torch.arange(self._images) + number * self._images
        self._rule = rule
        self._coins = coins(0, 0, positions, teachers=TEACHERS, drop_probability=0.5)
        self._datasets = torch.randint(TEACHERS, (self._images,), generator=self._generator)

    def take(self, ranks: int, *, on_step: bool) -> tuple[float, Tensor]:
        """Returns loss and gradient of the step, averaged over the ranks.

        Args:
            ranks: Their number.
            on_step: Whether the whole step decides the weights, as in this package.
        """
        shares = torch.arange(self._images).chunk(ranks)
        if self._rule == "queue":
            everyone = torch.arange(self._images)
            parts = [self._queued(share, everyone if on_step else share) for share in shares]
        else:
            pairs = [self._pairs(share) for share in shares]
            number = sum((kept.sum() for _, kept in pairs), torch.zeros(()))
            parts = [
                weighted_loss(losses, kept, number, parts=ranks)
                if on_step
                else published(losses, kept)
                for losses, kept in pairs
            ]
        loss = torch.stack(parts).mean()
        (gradient,) = torch.autograd.grad(loss, self.weight)
        return loss.item(), gradient

    def _queued(self, share: Tensor, seen: Tensor) -> Tensor:
        """The loss of some images against a queue of those that are seen of each step."""
        made, wanted = (
            units(tokens.view(-1, TEACHERS, CHANNELS))
            for tokens in (self._inputs[share] @ self.weight, self._targets[share])
        )
        queue = torch.zeros(QUEUE, TEACHERS, CHANNELS)
        for targets in (*self._earlier[-QUEUE // len(seen) :], self._targets):
            queue = pushed(queue, units(targets[seen].view(-1, TEACHERS, CHANNELS)))
        losses = [
            queue_divergence(made[:, t], wanted[:, t], queue[:, t]).mean() for t in range(TEACHERS)
        ]
        return torch.stack(losses).mean()

    def _pairs(self, share: Tensor) -> tuple[Tensor, Tensor]:
        """Losses (T, B) of some images, and which are kept."""
        made = (self._inputs[share] @ self.weight).view(-1, TEACHERS, 1, CHANNELS)
        wanted = self._targets[share].view_as(made)
        losses = torch.stack(
            [self._loss.per_image(made[:, t], wanted[:, t]) for t in range(TEACHERS)]
        )
        if self._rule == "drop":
            return losses, kept_beside_worst(losses, self._coins[:, share])
        return losses, kept_of_own_data(self._datasets[share], TEACHES)


def main() -> int:
    """Takes steps and prints how far those on several ranks are from those on one."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=128)
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--out", type=Path, default=RESULTS / "teacher_choice.json")
    given = parser.parse_args()
    results = {**conditions(__file__, __doc__, ("torch",)), "images": given.images, "steps": []}
    for rule in ("drop", "own_data", "queue"):
        steps = Steps(given.images)
        found: dict[tuple[str, int], list[tuple[float, float]]] = {}
        before = FILLED if rule == "queue" else 0
        for number in range(before + given.steps):
            steps.draw(number, rule)
            if number < before:
                continue
            for whose, on_step in (("published", False), ("here", True)):
                loss, gradient = steps.take(1, on_step=on_step)
                for ranks in (2, 4, 8, 16):
                    other, slope = steps.take(ranks, on_step=on_step)
                    apart = ((slope - gradient).norm() / gradient.norm()).item()
                    found.setdefault((whose, ranks), []).append((abs(other / loss - 1), apart))
            with torch.no_grad():
                steps.weight -= 2.0 * gradient
        for (whose, ranks), pairs in found.items():
            losses, gradients = zip(*pairs, strict=True)
            row = {"loss": spread(losses), "gradient": spread(gradients)}
            results["steps"].append({"rule": rule, "whose": whose, "ranks": ranks, **row})
            print(
                f"{rule:8} {whose:9} {ranks:2} ranks: loss {row['loss']['median']:.1e}, "
                f"gradient {row['gradient']['median']:.1e} from one rank's (medians)"
            )
    write(results, given.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
