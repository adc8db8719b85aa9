"""Bytes that a rank holds between steps, against the plan: small runs at ZeRO 1 to 3.

held_bytes.py FOLDER, with convnet.py of docs/extending.md in it.
"""

from __future__ import annotations

import gc
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import scenarios
import torch
from launch import write_result
from tensor_storages import storages

from fd_large import doors
from fd_large.data.loader import Batch
from fd_large.engine.forward_backward import forward_backward
from fd_large.engine.zero import start
from fd_large.engine.zero.optimizer import set_learning_rate
from fd_large.ranks import distributed
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.run import Run
from fd_large.recipes.sections import Student

SWIN = Architecture(embed_dim=32, depths=(1, 1, 2, 1), num_heads=(1, 2, 4, 8), window_size=4)
VIT = Architecture(embed_dim=96, depths=(3,), num_heads=(3,))
# Swin V1's windows and CLIP's positions are made for an image size.
TWINS = {
    "fd_swinv2g": (SWIN, SWIN, "sharded"),
    "fd_clip_vit_base": (VIT, replace(VIT, image_size=64), "replicated"),
    "fd_esvit_swin_base": (SWIN, replace(SWIN, image_size=64, window_size=2), "sharded"),
}
ZERO = {
    1: {"stage": 1, "reduce_bucket_size": 1_000_000},
    2: {"stage": 2, "reduce_bucket_size": 1_000_000},
    3: {"stage": 3, "reduce_bucket_size": 10_000, "stage3_param_persistence_threshold": 500},
}


def twin(name: str) -> Run:
    """The recipe with small nets."""
    run = registry.get(name)
    student, teacher, placement = TWINS[name]
    return replace(
        run,
        student=replace(run.student, architecture=student),
        teacher=replace(
            run.teacher, architecture=teacher, source="random", placement=placement, dtype="auto"
        ),
        data=replace(run.data, image_size=64),
        batch=replace(run.batch, global_batch_size=2, micro_batch_size=1),
    )


def with_student(model: str) -> Run:
    """CLIP's twin with a student that the package did not write."""
    run = twin("fd_clip_vit_base")
    return replace(
        run,
        student=Student(model=model),
        objective=replace(run.objective, interpolation="bilinear"),
    )


def held(run: Run, zero: dict[str, Any]) -> dict[str, Any]:
    """What the ranks hold after a step, and what the plan says."""
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8)
    batch = Batch(images, 0, torch.zeros(1), torch.zeros(1, dtype=int))
    before = storages()
    engine, teacher = scenarios.start_engine(run, dict(zero))
    set_learning_rate(engine.deepspeed.optimizer, 1e-4)
    forward_backward(engine, batch, 0)
    engine.deepspeed.step()
    after = storages()
    mine = sum(size for address, size in after.items() if address not in before)
    result = {
        "measured": distributed.gather_objects(mine),
        "planned": scenarios.planned_bytes(run, engine.config),
    }
    engine.deepspeed.destroy()
    del engine, teacher
    start.forget_engines()
    gc.collect()
    return result


def main(folder: str) -> None:
    """Measures every run at every stage, in both types."""
    distributed.start()
    start.start()
    module = f"module:{Path(folder, 'convnet.py')}:ConvNet"
    doors.allow(module)
    runs = {name: twin(name) for name in TWINS}
    runs |= {name: with_student(name) for name in ("timm:convnextv2_atto", module)}
    results = {}
    for name, run in runs.items():
        for stage, zero in ZERO.items():
            precision = "bfloat16" if stage == 2 or name == "fd_swinv2g" else "float32"
            run = replace(run, engine=replace(run.engine, precision=precision))
            results[f"{name}, ZeRO-{stage}, {precision}"] = held(run, zero)
    write_result(folder, results)
    distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[-1])
