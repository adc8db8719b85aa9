"""Tiny models on disk: the folder of a run, and weights."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from loading import scattered
from stored_run import store_tensors

from fd_large.backbones.registry import build
from fd_large.backbones.statistics import OPENAI_CLIP
from fd_large.engine.frozen import Frozen
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture, resolve
from fd_large.recipes.run import Run
from fd_large.recipes.sections import Data, Student
from fd_large.tasks.distillation.job import DistillationJob
from fd_large.tasks.distillation.section import Teacher
from fd_large.tasks.distillation.task import Distillation
from fd_large.weights.convert import write

VIT = Architecture(embed_dim=16, depths=(2,), num_heads=(2,), patch_size=8, image_size=32)
SWIN = Architecture(
    embed_dim=16, depths=(2, 2), num_heads=(2, 4), window_size=2, patch_size=4, image_size=32
)


@pytest.fixture
def vit_weights(tmp_path: Path) -> Path:
    """A ViT with CLS in this project's format."""
    architecture = resolve("clip_vit_base_patch16", VIT)
    net = scattered(build("clip_vit_base_patch16", VIT), seed=2)
    write(net.named_parameters(), architecture, "fd", tmp_path / "vit", statistics=OPENAI_CLIP)
    return tmp_path / "vit"


@pytest.fixture
def distillation(tmp_path: Path) -> tuple[Path, Run, Distillation]:
    """A run whose teacher is random, and its task as it was stored, with averages of weights."""
    run = replace(
        registry.get("quickstart"),
        student=Student(model="swinv2_tiny", architecture=SWIN),
        teacher=Teacher(model="clip_vit_base_patch16", architecture=VIT, source="random"),
        data=Data(root="builtin:photographs", image_size=32),
    )
    folder = tmp_path / "runs" / "tiny"
    task = stored_task(run)
    tensors = {name: p.detach() for name, p in task.named_parameters()}
    worse: dict[str, Any] = {name: t + 1 for name, t in tensors.items()}
    store_tensors(folder, worse, ranks=2, recipe=run.to_dict(), ema=tensors)
    return folder, run, task


def stored_task(run: Run) -> Distillation:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(run.runtime.seed + 1)
        teacher: Frozen = DistillationJob(run).make_teacher()
        task = DistillationJob(run).task_around(teacher)
    return scattered(task, seed=1).eval()
