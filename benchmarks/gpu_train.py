"""Trains like fd_large/train.py, from random weights that are quick to make. A part of gpu.sh.

    python benchmarks/gpu_train.py ARGUMENTS_OF_TRAIN...

On one core, 6.0B random numbers take three quarters of a minute. Here a large parameter repeats the
first million of its random numbers. Zeros would not do, since a GPU multiplies them with less
power, and thus faster.

FD_GPU_TRAIN=clock turns on DeepSpeed's throughput timer, which waits for the device.
FD_GPU_TRAIN=unordered removes the event after which ZeRO-3 gathers the weights that the optimiser
wrote. FD_GPU_MEMORY names a file to which the seconds, the allocated bytes and the reserved bytes
are added twice a second.
"""

from __future__ import annotations

import json
import os
import runpy
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
sys.path[0] = str(ROOT)

from fd_large.backbones import initialization  # noqa: E402
from fd_large.engine.zero import config  # noqa: E402

DRAWN = 2**20
_fill, _for_deepspeed = initialization.fill, config.for_deepspeed


@torch.no_grad()
def repeated(parameter: Tensor, draw: initialization.Draw, fan_in: int | None = None) -> None:
    """Fills a parameter with repetitions of the first `DRAWN` random numbers.

    Args:
        parameter: Tensor of any shape, float dtype and device.
        draw: Distribution of the values.
        fan_in: Number of inputs of the layer, for "fan_in_uniform". None: `parameter` is a weight
            (out, ...), and its number of elements per output is used.
    """
    if parameter.is_meta or parameter.numel() <= DRAWN or draw.kind == "constant":
        _fill(parameter, draw, fan_in)
        return
    flat = parameter.view(-1)
    _fill(flat[:DRAWN], draw, fan_in or parameter[0].numel())
    for start in range(DRAWN, len(flat), DRAWN):
        flat[start : start + DRAWN] = flat[: min(DRAWN, len(flat) - start)]


def clocked(config: dict[str, Any]) -> dict[str, Any]:
    """Returns the JSON for DeepSpeed that the package makes of `config`, with one change.

    DeepSpeed's throughput timer, which the package turns off, is on, as by DeepSpeed's default.
    """
    return {**_for_deepspeed(config), "timers": {"throughput": {"enabled": True}}}


def note_memory(file: Path) -> None:
    """Adds the GPU memory of this process to a file, twice a second, until the process ends.

    A line is [seconds since the start, allocated bytes, reserved bytes]. Without a GPU, both
    numbers of bytes are the resident memory of the process.
    """
    process, begin = psutil.Process(), time.time()
    while True:
        if torch.cuda.is_available():
            sizes = (torch.cuda.memory_allocated(), torch.cuda.memory_reserved())
        else:
            sizes = (process.memory_info().rss,) * 2
        with file.open("a") as lines:
            lines.write(json.dumps([round(time.time() - begin, 1), *sizes]) + "\n")
        time.sleep(0.5)


if __name__ == "__main__":
    if (file := os.environ.get("FD_GPU_MEMORY")) and os.environ.get("RANK", "0") == "0":
        threading.Thread(target=note_memory, args=(Path(file),), daemon=True).start()
    if os.environ.get("FD_GPU_TRAIN") == "clock":
        config.for_deepspeed = clocked
    if os.environ.get("FD_GPU_TRAIN") == "unordered":
        from fd_large.engine.zero import stream_order

        stream_order.order_gathers = lambda engine: None
    # Before the models' files are imported, which take the function by its name.
    initialization.fill = repeated
    sys.argv[0] = str(ROOT / "fd_large/train.py")
    runpy.run_path(sys.argv[0], run_name="__main__")
