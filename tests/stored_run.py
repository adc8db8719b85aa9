"""The folder of a run as training leaves it, without training."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fd_large.checkpoint import store, tensor_file
from fd_large.checkpoint.layout import EachTensor, FlatGroups, Layout


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
