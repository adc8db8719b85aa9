"""The code of a model card, run as it stands on an image."""

from __future__ import annotations

import ast

import numpy as np
import torch
from PIL import Image

from fd_large.backbones.statistics import IMAGENET


def run_code(card, out, folder):
    """Runs it on an image of 32 pixels.

    Args:
        card: The text of the card.
        out: The folder of the export.
        folder: A folder for the image.

    Returns: the names that the code has set, and the normalised image (1, 3, 32, 32).
    """
    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "image.png")
    code = card.split("```python\n")[1].split("```")[0]
    code = code.replace("FOLDER", str(out)).replace("IMAGE.jpg", str(folder / "image.png"))
    found = {}
    exec(code, found)
    nodes = list(ast.walk(ast.parse(code)))
    imports = [node for node in nodes if isinstance(node, (ast.Import, ast.ImportFrom))]
    names = {(one.asname or one.name).partition(".")[0] for node in imports for one in node.names}
    assert names <= {node.id for node in nodes if isinstance(node, ast.Name)}, "all are used"
    mean, std = (torch.tensor(numbers)[:, None, None] for numbers in IMAGENET[:2])
    return found, ((torch.from_numpy(pixels).permute(2, 0, 1) / 255 - mean) / std)[None]
