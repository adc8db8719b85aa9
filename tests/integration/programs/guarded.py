"""Rank program: runs with images that make the loss NaN, or fifty times as large.

guarded.py FOLDER; in it spoilt.json, {update: [rank, "nan" or "spike"]} of the first epoch, and
runs.json, {name: words of train}. Each rank leaves what it saw of every run: its exit code, and of
each step whether it was skipped, a digest of all that training changes, and where its images
came from.
"""

from __future__ import annotations

import gc
import hashlib
import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from launch import write_result
from torch import Tensor

from fd_large.data.loader import Batch
from fd_large.tasks.distillation.task import Distillation

# An image of this one value is the mark; no photograph has one.
MARKS = {"nan": 77, "spike": 78}


def spoil(patch: Callable[[Any, str, Any], None]) -> None:
    """Lets marked images do what they are marked for, in any process that trains or replays.

    Args:
        patch: setattr, or a monkeypatch's.
    """
    prepare, forward = Distillation.prepare, Distillation.forward

    def spoilt_prepare(
        self: Distillation, images: Tensor, targets: Any, keep: Tensor | None
    ) -> dict[str, Any]:
        prepared = prepare(self, images, targets, keep)
        prepared["pixels"][_marked(images, MARKS["nan"])] = torch.nan
        return prepared

    def spoilt_forward(self: Distillation, *, pixels: Tensor, **rest: Any) -> Any:
        loss, metrics = forward(self, pixels=pixels, **rest)
        return loss * (50.0 if _marked(pixels, pixels[..., :1, :1]).any() else 1.0), metrics

    patch(Distillation, "prepare", spoilt_prepare)
    patch(Distillation, "forward", spoilt_forward)


def _marked(images: Tensor, value: Any) -> Tensor:
    return (images == value).flatten(1).all(1)


def main(folder: Path) -> int:
    """Trains under watch; returns the last run's exit code."""
    # After the launch's variables are read; seconds.
    from fd_large.cli import main as cli
    from fd_large.engine import job, opening, run
    from fd_large.engine.zero import partition, start, state
    from fd_large.ranks import distributed
    from fd_large.runtime import guard
    from fd_large.runtime.hooks import Hook, Update

    spoilt = {int(u): mark for u, mark in json.loads((folder / "spoilt.json").read_text()).items()}
    guard.KNOWN = 4
    spoil(setattr)
    engines: list[Any] = []
    build_engine, build_loader = opening.build_engine, job.build_loader
    train, leave = run.train, distributed.leave

    def kept_engine(*arguments: Any, **named: Any) -> Any:
        engines[:] = [build_engine(*arguments, **named)]
        return engines[0]

    class Watch(Hook):
        def __init__(self) -> None:
            self.updates: list[dict[str, Any]] = []
            self.restored: list[dict[str, Any]] = []
            self.served: list[int] = []
            self.status = ""

        def after_update(self, update: Update) -> None:
            seen = {"index": update.index, "skipped": update.skipped, "loss": update.loss}
            self.updates.append(seen | {"digest": digest()})

        def on_roll_back(self, update: Update, restored: int) -> None:
            self.restored.append({"at": update.index, "to": restored, "digest": digest()})

        def on_end(self, status: str) -> None:
            self.status = status

    def digest() -> str:
        total = hashlib.blake2b(digest_size=8)
        for piece in state.shards(engines[0]):
            total.update(piece.values.contiguous().view(torch.uint8).numpy().tobytes())
        for parameter in engines[0].task.parameters():
            held, _ = partition.shard(parameter)
            total.update(held.detach().contiguous().view(torch.uint8).numpy().tobytes())
        return total.hexdigest()

    def watched(words: list[str]) -> dict[str, Any]:
        watch = Watch()

        def marked_loader(*arguments: Any, **named: Any) -> Iterator[Batch]:
            for batch in build_loader(*arguments, **named):
                update = int(batch.positions[0]) // named["global_batch_size"]
                watch.served.append(update)
                rank, mark = spoilt.get(update, (None, ""))
                if rank == distributed.rank():
                    batch = replace(batch, images=torch.full_like(batch.images, MARKS[mark]))
                yield batch

        def watched_train(*arguments: Any, **named: Any) -> int:
            return train(*arguments, hooks=[watch], **named)

        job.build_loader, run.train = marked_loader, watched_train
        return {"code": cli.main(["train", *words]), **vars(watch)}

    opening.build_engine, distributed.leave = kept_engine, lambda code: code
    found = {}
    for name, words in json.loads((folder / "runs.json").read_text()).items():
        found[name] = watched(words)
        engines.clear()
        start.forget_engines()
        gc.collect()
    write_result(folder, found)
    return leave(found[name]["code"])


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
