"""A tiny model, its weights and images, for comparisons with the official training code.

What the official code makes of them stands in `official_numbers.json`, which
`make_official_numbers.py` writes.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from fd_large.data.loader import Batch
from fd_large.engine.schedule import CosineSchedule
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.sections import Student

NUMBERS = Path(__file__).with_name("official_numbers.json")

CLASSES, BATCH, STEPS, WARMUP = 7, 16, 10, 3
NUM_TEST = 32
# As the official class VisionTransformer names them.
VIT = {
    "img_size": 32,
    "patch_size": 8,
    "embed_dim": 32,
    "depth": 3,
    "num_heads": 2,
    "mlp_ratio": 4.0,
    "qkv_bias": True,
    "init_values": 0.1,
    "with_k_bias": False,
    "use_abs_pos_emb": False,
    "use_rel_pos_bias": False,
    "use_shared_rel_pos_bias": True,
    "with_cls_token": True,
}
# Learning rates are those of the batch, not per 512 images.
FINETUNING = {
    "base_lr": 2e-3,
    "warmup_lr": 1e-5,
    "min_lr": 2e-5,
    "weight_decay": 0.05,
    "layer_decay": 0.6,
    "clip_norm": 1.0,
    "smoothing": 0.1,
}
# LARS moves a tensor by a thousandth of its norm times the learning rate.
LINEAR = {"base_lr": 40.0, "warmup_lr": 5.0, "min_lr": 1.0, "weight_decay": 0.02}


def schedule(settings: dict[str, float]) -> CosineSchedule:
    """The learning rates of the steps."""
    peak, start, end = (settings[name] for name in ("base_lr", "warmup_lr", "min_lr"))
    return CosineSchedule(peak, start, end, STEPS, WARMUP)


def student(folder: Path) -> Student:
    """The model as a recipe of fine-tuning has it; writes its weights as pre-training leaves them.

    Args:
        folder: Where the file of the weights is written.
    """
    state = {f"encoder.{n}": weight(n, tuple(shape)) for n, shape in numbers()["encoder"].items()}
    torch.save({"model": state}, folder / "pretrained.pth")
    architecture = Architecture(
        embed_dim=VIT["embed_dim"],
        depths=(VIT["depth"],),
        num_heads=(VIT["num_heads"],),
        patch_size=VIT["patch_size"],
        image_size=VIT["img_size"],
        relative_position="block",
    )
    return Student(
        model="vit_base_patch16",
        architecture=architecture,
        init=str(folder / "pretrained.pth"),
        drop_path_rate=0.0,
    )


def batch(number: int) -> Batch:
    """The images of a step, with their labels as targets."""
    positions = torch.arange(BATCH) + number * BATCH
    seen, known = (of("train", STEPS * BATCH)[positions] for of in (images, labels))
    return Batch(seen, 0, positions, positions, targets=known)


def numbers() -> dict[str, Any]:
    """Returns what the official code made of this file's inputs."""
    return json.loads(NUMBERS.read_text())


def drawn(name: str, shape: tuple[int, ...], scale: float = 1.0, mean: float = 0.0) -> Tensor:
    """Normal numbers in float64 that depend on a name alone, whatever the library's version."""
    draws = np.random.RandomState(crc32(name.encode())).standard_normal(shape)
    return torch.from_numpy(np.asarray(mean + scale * draws))


def weight(name: str, shape: tuple[int, ...]) -> Tensor:
    """A tensor of the pre-trained encoder or of the classifier, by its official name, float32."""
    scale, mean = 0.15, 0.0
    if "norm" in name and name.endswith("weight"):
        mean = 1.0
    elif "gamma" in name:
        scale, mean = 0.05, 0.3
    return drawn(name, shape, scale, mean).float()


def images(name: str, count: int) -> Tensor:
    """(count, 3, 32, 32) uint8, coarse enough to differ visibly."""
    coarse = drawn(name, (count, 3, 4, 4), 60.0, 128.0).clamp(0, 255)
    return coarse.round().byte().repeat_interleave(8, 2).repeat_interleave(8, 3)


def labels(name: str, count: int) -> Tensor:
    """(count,) int64."""
    return (drawn(name, (count,), 100.0).abs().long()) % CLASSES
