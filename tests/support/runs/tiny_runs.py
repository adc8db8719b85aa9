"""Tiny models on disk: the folder of a distillation run, weights, a refused step."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from loading import scattered
from stored_run import store_tensors

from fd_large.backbones.registry import build
from fd_large.backbones.statistics import OPENAI_CLIP
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture, resolve
from fd_large.recipes.run import Run
from fd_large.recipes.sections import Data, Student
from fd_large.recipes.sections import Guard as Limits
from fd_large.runtime.guard import Guard
from fd_large.runtime.hooks import Evidence, Setting, Update
from fd_large.tasks.distillation.job import DistillationJob
from fd_large.tasks.distillation.section import NamedTeacher, Objective, Teacher
from fd_large.tasks.distillation.task import Distillation
from fd_large.weights.convert import write

VIT = Architecture(embed_dim=16, depths=(2,), num_heads=(2,), patch_size=8, image_size=32)
SWIN = Architecture(
    embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=2, patch_size=4, image_size=32
)


def vit_file(folder: Path) -> Path:
    """A ViT with CLS in this project's format."""
    architecture = resolve("clip_vit_base_patch16", VIT)
    net = scattered(build("clip_vit_base_patch16", VIT), seed=2)
    write(net.named_parameters(), architecture, "fd", folder / "vit", statistics=OPENAI_CLIP)
    return folder / "vit"


def tiny_run(root: str = "builtin:photographs") -> Run:
    """Distils a random ViT into a Swin V2 of two stages."""
    return replace(
        registry.get("quickstart"),
        student=Student(model="swinv2_tiny", architecture=SWIN),
        teacher=Teacher(model="clip_vit_base_patch16", architecture=VIT, source="random"),
        data=Data(root=root, image_size=32),
    )


def with_teachers(run: Run, *names: str, **fields: Any) -> Run:
    """The run with its teacher under each of these names, and other values of some fields."""
    entry = NamedTeacher.joined(run.teacher, run.objective)
    teachers = dict.fromkeys(names, entry)
    named = replace(run, teacher=Teacher(), objective=Objective(), teachers=teachers)
    return named.with_fields(fields)


def several_teachers(run: Run) -> Run:
    """The tiny run with two teachers, of one of which the summary is learnt too."""
    both = {"targets": ("map", "summary"), "head": "block", "normaliser": "running"}
    fields = {f"teachers.both.{name}": value for name, value in both.items()}
    return with_teachers(run, "plain", "both", **{"teachers.plain.normaliser": "none", **fields})


def tiny_task(run: Run) -> Distillation:
    """The run's task with random weights, around the teacher that the run has."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.runtime.seed + 1)
        teachers = DistillationJob(run).make_teachers()
        task = DistillationJob(run).task_around(teachers)
    return scattered(task, seed=1).eval()


def store_task(
    folder: Path, run: Run, task: Distillation, others: dict[str, Any] | None = None, **options: Any
) -> None:
    """Stores the task as the checkpoint of a run, with what else the folder of a run has."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.json").write_text(json.dumps(run.to_dict()))
    (folder / "deepspeed.json").write_text("{}")
    tensors = {name: p.detach() for name, p in task.named_parameters()} | (others or {})
    store_tensors(folder, tensors, ranks=2, recipe=run.to_dict(), **options)


def store_incident(
    folder: Path, step: int, images: list[torch.Tensor], losses: list[float]
) -> Path:
    """Has the guard refuse a step of these micro batches of this rank's."""
    guard, count = Guard(Limits()), sum(map(len, images))
    facts: dict[str, Any] = {"facts": {}, "log_every": 1, "global_batch_size": count}
    setting = Setting(
        folder=folder,
        first_update=step,
        total_updates=100,
        micro_batch_size=len(images[0]),
        accumulation=len(losses),
        world_size=1,
        **facts,
    )
    guard.on_start(setting)
    update = Update(step, 2, math.nan, 1.5, 1e-3)
    guard.judge(update)
    positions = torch.arange(count) + 40
    guard.on_skip(update, Evidence(images, positions, positions + 100, losses, {"projection": 2.0}))
    return folder / "incidents" / f"update_{step + 1:08d}" / "incident.json"
