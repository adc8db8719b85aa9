"""Small heads of all kinds on maps of noise, for tests of detection."""

from __future__ import annotations

from functools import partial

import numpy as np
import torch
from detection_batches import NUM_CLASSES

from fd_large.tasks.detection.heads.cascade import CascadeHeads
from fd_large.tasks.detection.heads.htc import HtcHeads
from fd_large.tasks.detection.heads.roi_heads import RoIHeads

HEADS = {
    "mask_rcnn": RoIHeads,
    "mmdet": CascadeHeads,
    "giou": partial(CascadeHeads, box_loss="giou", class_agnostic=False),
    "htc": partial(HtcHeads, box_loss="giou", semantic_classes=9),
    "detectron2": partial(CascadeHeads, form="detectron2", box_loss="l1"),
}
ROIS, STRIDES = 16, (4.0, 8.0, 16.0, 32.0, 64.0)
SIZES = torch.tensor([[64, 64], [64, 64]])


def heads_and_maps(kind: str) -> tuple[torch.nn.Module, list[torch.Tensor]]:
    """Heads of a kind, and a pyramid for two images of 64 pixels."""
    torch.manual_seed(0)
    heads = HEADS[kind](NUM_CLASSES, 8, rois_per_image=ROIS)
    return heads, [torch.randn(2, 8, n, n, requires_grad=True) for n in (16, 8, 4, 2, 1)]


def terms_of(heads, maps, proposals, targets) -> tuple[dict, dict]:
    """The sums and the counts of the losses, by name."""
    draws = np.random.default_rng(0).random((2, heads.draws_per_image))
    terms = heads.terms(maps, STRIDES, proposals, SIZES, targets, draws)
    return {n: total for n, (total, _) in terms.items()}, {n: c for n, (_, c) in terms.items()}
