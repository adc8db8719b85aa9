"""Rank program: replays a stored training run in the engine under ZeRO-3.

python tests/oracles/oracle_training_run.py FOLDER, with spec.json and tensors.safetensors in it;
writes found.safetensors and each rank's losses, norms and rates.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path

import deepspeed
import torch
from engine_steps import forward_at
from launch import write_result
from oracles_models import clip_vit, fd_swinv2, fd_vit, swin_v1
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from translated_names import translate
from whole_weights import whole_weights

from fd_large.backbones.statistics import IMAGENET, OPENAI_CLIP
from fd_large.data.loader import Batch
from fd_large.engine.frozen import Frozen
from fd_large.engine.schedule import CosineSchedule
from fd_large.engine.zero import config as ds
from fd_large.engine.zero import start
from fd_large.engine.zero.engine import build_engine
from fd_large.kernels.whitened_loss import whiten
from fd_large.ranks import distributed
from fd_large.recipes import registry
from fd_large.tasks.distillation.objective import make_target
from fd_large.tasks.distillation.task import Distillation
from fd_large.tasks.distillation.teacher import place
from fd_large.weights.published import detect


def nets(spec: dict) -> tuple[nn.Module, nn.Module, tuple]:
    """Student, teacher and the teacher's statistics from the file's configuration."""
    student, teacher = spec["config"]["student"], spec["config"]["teacher"]
    if "depths" in student:
        return fd_swinv2(student), swin_v1(teacher), IMAGENET
    clip = {
        "width": teacher["width"],
        "layers": teacher["layers"],
        "heads": teacher["heads"],
        "patch_size": teacher["patch"],
        "input_resolution": teacher["img"],
    }
    return fd_vit(student), clip_vit(clip), OPENAI_CLIP


def part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def main(folder: Path) -> None:
    distributed.start()
    start.start()
    spec = json.loads((folder / "spec.json").read_text())
    tensors, config = load_file(folder / "tensors.safetensors"), spec["config"]
    world, rank = distributed.world_size(), distributed.rank()
    published = part(tensors, "weights.")

    def make_teacher() -> Frozen:
        _, net, statistics = nets(spec)
        return Frozen(net, statistics)

    taught = part(published, "feature_model.")
    teacher = place(
        make_teacher,
        placement="sharded",
        dtype=torch.float32,
        seed=0,
        node_size=world,
        persistence_threshold=0,
        weights=translate(detect(taught), taught.items()),
    )

    def make_task() -> Distillation:
        student, _, _ = nets(spec)
        return Distillation(student, {"": teacher}, [make_target(student.width, teacher.width)])

    run = registry.get("fd_clip_vit_base")
    run = replace(
        run,
        optim=replace(
            run.optim,
            weight_decay=config["weight_decay"],
            betas=tuple(config["betas"]),
            eps=config["eps"],
            clip_norm=config["clip_grad"],
        ),
    )
    zero = {"stage": 3, "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1_000_000}
    share = config["batch"] // world
    filled = ds.fill(
        {"zero_optimization": zero},
        ds.RunNumbers(share, 1, world, world, config["clip_grad"], False, (1,)),
    )

    learnt = {n: t for n, t in published.items() if not n.startswith("feature_model.")}
    form = "fd_swinv2" if "depths" in config["student"] else "fd_vit"
    weights = {
        n if n.startswith("projection.") else f"student.{n}": t
        for n, t in translate(form, learnt.items())
    }
    engine = build_engine(
        make_task, filled, optim=run.optim, seed=run.runtime.seed, initial={"": weights.items()}
    )
    engine.task.train()
    schedule = CosineSchedule(
        config["base_lr"],
        config["warmup_lr"],
        config["min_lr"],
        config["steps"],
        config["warmup_steps"],
    )
    found: dict[str, Tensor] = {}
    losses, norms, rates = [], [], []
    for step in range(config["steps"]):
        images = tensors["images_u8"][step % config["batches"]]
        if step == 0:
            found |= first_maps(engine, images)
        rates.append(schedule.at_step(step))
        positions = torch.arange(rank * share, (rank + 1) * share)
        batch = Batch(images[positions], 0, positions, positions)
        loss = forward_at(engine, schedule, step, batch)
        if step == 0:
            for name, parameter in engine.task.named_parameters():
                found[f"gradient.{name}"] = deepspeed.utils.safe_get_full_grad(parameter).clone()
        engine.deepspeed.step()
        losses.append((distributed.sum_tensor(loss) / distributed.world_size()).item())
        norms.append(float(engine.deepspeed.get_global_grad_norm()))
    for name, value in whole_weights(engine.task):
        found[f"final.{name}"] = value
    if distributed.is_main():
        save_file({n: t.contiguous() for n, t in found.items()}, folder / "found.safetensors")
    distributed.barrier()
    write_result(folder, {"losses": losses, "grad_norms": norms, "rates": rates})


def first_maps(engine: object, images: Tensor) -> dict[str, Tensor]:
    """The student's map and the whitened target of the first batch, before any update."""
    task = engine.task
    seen: dict[str, Tensor] = {}
    handle = task.student.register_forward_hook(
        lambda module, inputs, output: seen.update(student_map=output.tokens.detach().clone())
    )
    with torch.no_grad():
        prepared = task.prepare(images, None, None)
        engine.deepspeed(**prepared)
    handle.remove()
    return {
        "first.student_map": seen["student_map"],
        "first.target": whiten(prepared["maps"][""].tokens),
    }


if __name__ == "__main__":
    main(Path(sys.argv[1]))
