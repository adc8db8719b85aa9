"""Distillation whose student is tested by its nearest neighbours as it trains."""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fd_large import distributed
from fd_large.backbones.feature_map import FeatureMap
from fd_large.backbones.statistics import IMAGENET
from fd_large.data.labelled import open_split
from fd_large.data.source import ImageSource
from fd_large.engine.ema import Ema
from fd_large.engine.evaluation import evaluating
from fd_large.engine.job import Evaluate
from fd_large.engine.zero.engine import Engine
from fd_large.probes import knn
from fd_large.probes.features import extract
from fd_large.tasks.distillation.job import DistillationJob


class WatchedDistillation(DistillationJob):
    """Distillation with `eval.knn_root`."""

    def check(self) -> None:
        """Opens the labelled images too."""
        super().check()
        self._labelled()

    def evaluate_every(self) -> int:
        """Often enough for both."""
        return math.gcd(self.run.eval.every, self.run.eval.knn_every)

    def evaluation(
        self, engine: Engine, samples: ImageSource, micro_batch_size: int, ema: Ema | None
    ) -> Evaluate | None:
        """Held-out losses where there are held-out images, and the vote of neighbours."""
        losses = super().evaluation(engine, samples, micro_batch_size, ema)
        train_set, test_set = self._labelled()

        def evaluate(
            update: int, last: bool, between: Callable[[], None]
        ) -> tuple[dict[str, float], dict[str, Any] | None]:
            metrics: dict[str, float] = {}
            panel = None
            if losses is not None and _is_due(update, last, self.run.eval.every):
                metrics, panel = losses(update, last, between)
            if not _is_due(update, last, self.run.eval.knn_every):
                return metrics, panel
            folder = Path(self.run.run_dir()) / "features"
            found = {}
            with ema.in_place_of_weights() if ema else nullcontext(), evaluating(engine):
                for name, pictures in (("train", train_set), ("test", test_set)):
                    found[name] = extract(
                        _student_of(engine),
                        IMAGENET,
                        pictures,
                        folder / name,
                        image_size=self.run.data.image_size,
                        batch_size=micro_batch_size,
                        workers=self.run.data.workers,
                        max_pixels=self.run.data.max_pixels,
                        between=between,
                    )
            metrics["test_knn"] = knn.accuracy(
                found["train"],
                found["test"],
                num_classes=len(train_set.classes),
                between=between,
            )
            distributed.barrier()
            if distributed.is_main():
                shutil.rmtree(folder, ignore_errors=True)
            return metrics, panel

        return evaluate

    def _labelled(self) -> tuple[Any, Any]:
        root = self.run.eval.knn_root
        train_set = open_split(root, "train", where="eval.knn_root")
        return train_set, open_split(root, "val", train_set.classes, where="eval.knn_root")


def _is_due(update: int, last: bool, every: int) -> bool:
    return last or update == 0 or (bool(every) and update % every == 0)


def _student_of(engine: Engine) -> Callable[[Tensor], FeatureMap]:
    """The student's map by a forward of the whole task, which is what gathers its pieces.

    The teacher is spared: its map is made of zeros.
    """
    task = engine.task
    seen: list[FeatureMap] = []
    target: FeatureMap | None = None

    def forward(pixels: Tensor) -> FeatureMap:
        nonlocal target
        if target is None:
            images = torch.zeros_like(pixels[:1], dtype=torch.uint8)
            target = task.prepare(images, None, None)["target"]
        tokens = torch.zeros_like(target.tokens).expand(len(pixels), -1, -1)
        handle = task.student.register_forward_hook(lambda _m, _i, output: seen.append(output))
        try:
            engine.deepspeed(pixels=pixels, keep=None, target=target._replace(tokens=tokens))
        finally:
            handle.remove()
        return seen.pop()

    return forward
