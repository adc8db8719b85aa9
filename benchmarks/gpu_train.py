"""Trains as fd_large/train.py does, from weights that cost little to draw: a part of gpu.sh.

    python benchmarks/gpu_train.py ARGUMENTS_OF_TRAIN...

On one core 6.0B random numbers take three quarters of a minute. Here a parameter repeats the first
million of its draws. They are not zeros, which a GPU multiplies with less power, and so faster.
"""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from fd_large.backbones import initialization  # noqa: E402

DRAWN = 2**20
_fill = initialization.fill


@torch.no_grad()
def repeated(parameter: Tensor, draw: initialization.Draw, fan_in: int | None = None) -> None:
    """Fills a parameter with the same draws again and again; arguments as of `fill`."""
    if parameter.is_meta or parameter.numel() <= DRAWN or draw.kind == "constant":
        _fill(parameter, draw, fan_in)
        return
    flat = parameter.view(-1)
    _fill(flat[:DRAWN], draw, fan_in or parameter[0].numel())
    for start in range(DRAWN, len(flat), DRAWN):
        flat[start : start + DRAWN] = flat[: min(DRAWN, len(flat) - start)]


if __name__ == "__main__":
    # Before the models' files are imported, which take the function by its name.
    initialization.fill = repeated
    sys.argv[0] = str(ROOT / "fd_large/train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
