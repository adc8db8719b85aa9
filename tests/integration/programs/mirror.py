"""Rank program: twenty steps of examples/fd.py and of the engine from the same weights and views.

A process of its own at stage 1: DeepSpeed's stage 3 replaces `F.linear` for the process, and the
file would change along with the engine.
"""

from __future__ import annotations

import runpy
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from engine_steps import forward_at
from launch import write_result
from torch import Tensor
from whole_weights import whole_weights

from fd_large.backbones.statistics import IMAGENET
from fd_large.backbones.vit.vit import ViT
from fd_large.data.loader import Batch
from fd_large.data.random_numbers import drop_path_keep
from fd_large.engine.frozen import Frozen
from fd_large.engine.schedule import CosineSchedule
from fd_large.engine.zero import config, start
from fd_large.engine.zero.engine import build_engine
from fd_large.ranks import distributed
from fd_large.recipes import registry
from fd_large.tasks.distillation.objective import make_target
from fd_large.tasks.distillation.task import Distillation

FD = runpy.run_path(str(Path(__file__).resolve().parents[3] / "examples" / "fd.py"))
STEPS, BATCH, SIDE, DROP_PATH = 20, 8, 64, 0.3
PEAK, START, LEAST, WARMUP = 1e-3, 5e-7, 5e-6, 4


def views() -> Tensor:
    """Returns the uint8 images of all steps, (STEPS, BATCH, 3, SIDE, SIDE)."""
    generator = torch.Generator().manual_seed(0)
    shape = (STEPS, BATCH, 3, SIDE, SIDE)
    return torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)


def first_model() -> Any:
    """Returns what the file trains, at its first weights."""
    torch.manual_seed(2)
    student = FD["ViT"](64, 3, 2, 16, SIDE, DROP_PATH)
    return FD["Distilled"](student, 48).train()


def of_engine(teacher: ViT, clip_norm: float) -> tuple[list[float], list[float], dict[str, Tensor]]:
    """Returns losses, gradient norms and last weights of the engine."""
    run = registry.get("fd_clip_vit_base")
    optim = replace(run.optim, weight_decay=0.05, betas=(0.9, 0.999), eps=1e-8, clip_norm=clip_norm)
    filled = config.fill(
        {"zero_optimization": {"stage": 1, "reduce_bucket_size": 1_000_000}},
        config.RunNumbers(BATCH, 1, 1, 1, clip_norm, False, (1,)),
    )

    def task() -> Distillation:
        student = ViT(64, 3, 2, patch_size=16, image_size=SIDE, drop_path_rate=DROP_PATH)
        return Distillation(student, {"": Frozen(teacher, IMAGENET)}, [make_target(64, 48)])

    weights = {name: value.detach().clone() for name, value in first_model().named_parameters()}
    engine = build_engine(task, filled, optim=optim, seed=0, initial={"": weights.items()})
    engine.task.train()
    schedule = CosineSchedule(PEAK, START, LEAST, STEPS, WARMUP)
    losses, norms = [], []
    for step, images in enumerate(views()):
        positions = torch.arange(BATCH) + step * BATCH
        batch = Batch(images, 0, positions, positions)
        losses.append(forward_at(engine, schedule, step, batch).item())
        engine.deepspeed.step()
        norms.append(float(engine.deepspeed.get_global_grad_norm()))
    return losses, norms, dict(whole_weights(engine.task))


def of_file(teacher: Any, clip_norm: float) -> tuple[list[float], dict[str, Tensor]]:
    """Returns losses and last weights of examples/fd.py."""
    model = first_model()
    optimiser = FD["make_optimiser"](model, 0.05, (0.9, 0.999))
    rates = torch.tensor(model.student.rates, dtype=torch.float64)[:, None]
    losses = []
    for step, images in enumerate(views()):
        positions = torch.arange(BATCH) + step * BATCH
        kept = drop_path_keep(model.student.rates, 0, 0, positions)
        with torch.no_grad():
            tokens = teacher(FD["normalise"](images, FD["MEAN"], FD["STD"]))
        rate = FD["learning_rate"](
            step, peak=PEAK, start=START, least=LEAST, warmup=WARMUP, steps=STEPS
        )
        keep = kept.float() / (1 - rates).float()
        losses.append(
            FD["train_step"](
                model, optimiser, images, tokens, keep=keep, rate=rate, clip_norm=clip_norm
            )
        )
    return losses, {name: value.detach() for name, value in model.named_parameters()}


def main(clip_norm: float, folder: str) -> None:
    """Writes the losses of both, the norms, and which weights differ."""
    torch.set_num_threads(1)
    distributed.start()
    start.start()
    torch.manual_seed(1)
    frozen = ViT(48, 2, 2, patch_size=16, image_size=SIDE)
    plain = FD["ViT"](48, 2, 2, 16, SIDE)
    plain.load_state_dict(frozen.state_dict())
    losses, norms, weights = of_engine(frozen, clip_norm)
    file_losses, file_weights = of_file(plain.eval(), clip_norm)
    differing = [name for name in weights if not torch.equal(weights[name], file_weights[name])]
    write_result(
        folder,
        {
            "engine": losses,
            "file": file_losses,
            "norms": norms,
            "weights": len(file_weights),
            "differing": differing,
        },
    )


if __name__ == "__main__":
    main(float(sys.argv[-2]), sys.argv[-1])
