"""How deep in its model a parameter sits, for learning rates that decay towards the input.

Source: the official fine-tuning code (optimizer.py, get_vit_layer, get_swin_layer); what it has no
rule for (norms, heads, shared position bias) belongs to the last layer.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

EMBEDDING = ("cls_token", "dist_token", "pos_embed", "mask_token", "patch_embed.")


def layer_id(name: str, depths: Sequence[int]) -> int:
    """The layer of a parameter: 0 for the embedding, b + 1 for block b, else the last.

    Args:
        name: Of the parameter inside its backbone.
        depths: Blocks of each stage; one entry for a model without stages.

    Returns: an id from 0 to sum(depths) + 1.
    """
    last = sum(depths) + 1
    if name.startswith(EMBEDDING):
        return 0
    if block := re.match(r"blocks\.(\d+)\.", name):
        return int(block[1]) + 1
    if block := re.match(r"layers\.(\d+)\.blocks\.(\d+)\.", name):
        return sum(depths[: int(block[1])]) + int(block[2]) + 1
    if stage := re.match(r"layers\.(\d+)\.downsample\.", name):
        # With the last block of the stage that it ends.
        return sum(depths[: int(stage[1]) + 1])
    return last


def layer_scale(name: str, depths: Sequence[int], decay: float) -> float:
    """Factor of a parameter's learning rate: decay to the number of layers above it."""
    return decay ** (sum(depths) + 1 - layer_id(name, depths))
