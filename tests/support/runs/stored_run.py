"""The folder of a run as training leaves it, without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from loading import scattered

from fd_large.backbones.registry import build
from fd_large.checkpoint import store, tensor_file
from fd_large.checkpoint.layout import EachTensor, FlatGroups, Layout
from fd_large.recipes import registry
from fd_large.recipes.architectures import Architecture


def store_tensors(
    folder: Path,
    tensors: dict[str, torch.Tensor],
    *,
    update: int = 3,
    ranks: int = 1,
    stage: int = 3,
    recipe: dict[str, Any] | None = None,
    ema: dict[str, torch.Tensor] | None = None,
    facts: dict[str, Any] | None = None,
    moments: Sequence[str] = (),
    receipts_of_kinds: bool = True,
) -> Path:
    """Writes a checkpoint of float32 masters, and averages, as so many ranks at that stage do.

    The moments hold the same as the masters. Receipts of the first release had checksums of whole
    files alone.
    """
    layout = layout_of({name: t.numel() for name, t in tensors.items()}, ranks, stage)
    part = store.checkpoints_of(folder) / (store.name_of(update) + store.PART)
    part.mkdir(parents=True)
    for rank in range(ranks):
        held = {}
        kinds = {"master": tensors, "ema": ema or {}, **dict.fromkeys(moments, tensors)}
        for kind, kept in kinds.items():
            for name, tensor in kept.items():
                span = layout.span(rank, name)
                if span.start < span.stop:
                    held[f"{kind}.{name}"] = tensor.reshape(-1)[span.start : span.stop].clone()
        path = part / store.file_of(rank)
        sums = tensor_file.write(path, held)
        receipt = {"bytes": path.stat().st_size, "crc32": sums.file}
        if receipts_of_kinds:
            receipt |= {"header": sums.header, "kinds": sums.kinds}
        (part / store.receipt_of(rank)).write_text(json.dumps(receipt))
    manifest = {
        "update": update,
        "samples": 64 * update,
        "world_size": ranks,
        "zero_stage": stage,
        "teacher_source": "/somewhere/clip.pt",
        "teacher_hash": "0123456789abcdef",
        "pictures": "fingerprint-of-the-pictures",
        "commit": "c0ffee",
        "recipe": recipe or {},
        "layout": layout.to_dict(),
        "ema": ema is not None,
        **(facts or {}),
    }
    return store.commit(part, manifest)


def layout_of(sizes: dict[str, int], ranks: int, stage: int) -> Layout:
    """ZeRO-3 cuts every tensor, stages 1 and 2 a line of them."""
    if stage == 3:
        return EachTensor(sizes, ranks)
    return FlatGroups((tuple(sizes.items()),), (-(-sum(sizes.values()) // ranks),), ranks)


# Students of distillation runs: what each is, as (model, fields of its architecture).
SWIN = {"embed_dim": 16, "num_heads": (2, 4), "depths": (2, 3), "window_size": 4, "patch_size": 2}
FOUR = {**SWIN, "num_heads": (1, 2, 2, 4), "depths": (1, 2, 2, 1)}
VIT = {"embed_dim": 32, "depths": (2,), "num_heads": (2,), "patch_size": 8}
STUDENTS = {
    "swinv2 of two stages": ("swinv2_base", {**SWIN, "pretrained_window_sizes": (3, 2)}),
    "swinv2 of four stages": ("swinv2_tiny", FOUR),
    "vit with a shared table": ("vit_base_patch16", VIT),
    "vit with tables": (
        "vit_base_patch16",
        {**VIT, "relative_position": "block", "absolute_position": True, "layer_scale": 0.0},
    ),
    "plain vit": ("dino_vit_base_patch16", VIT),
    "swin": ("swin_base_esvit", {**SWIN, "image_size": 32}),
}
TEACHER = Architecture(embed_dim=6, depths=(1,), num_heads=(1,), patch_size=8, image_size=32)
SUMMARY = {
    "updates": 3,
    "loss_start": 0.5,
    "loss_end": 0.25,
    "held_out_loss": 0.3125,
    "held_out_cosine": 0.75,
}


def store_student(
    folder, name, fields, *, source="random", teacher=TEACHER, facts=None, **options
):
    """Writes a distillation run's folder; returns the student that its newest checkpoint holds."""
    run = registry.get("fd_clip_vit_base")
    architecture = Architecture(**fields)
    run = replace(
        run,
        student=replace(run.student, model=name, architecture=architecture, **options),
        teacher=replace(run.teacher, source=source, architecture=teacher),
        data=replace(run.data, root="/somewhere/images", image_size=32),
    )
    folder.mkdir()
    (folder / "recipe.json").write_text(json.dumps(run.to_dict()))
    (folder / "summary.json").write_text(json.dumps(SUMMARY))
    net = scattered(build(name, replace(architecture, image_size=32), **options))
    tensors = {f"student.{n}": t.detach() for n, t in net.named_parameters()}
    tensors["projection.weight"] = torch.randn(6, net.width)
    tensors["projection.bias"] = torch.randn(6)
    store_tensors(folder, tensors, ranks=3, recipe=run.to_dict(), facts=facts)
    return net.requires_grad_(False)
