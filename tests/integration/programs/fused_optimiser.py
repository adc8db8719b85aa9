"""Rank program: which AdamW two ranks take if FusedAdam is right, wrong on one, broken on one."""

from __future__ import annotations

import sys
from typing import Any

import fused_adam
import pytest
import torch
from deepspeed.ops.op_builder import FusedAdamBuilder
from launch import write_result

from fd_large.engine.zero import start
from fd_large.engine.zero.optimizer import make_optimizer
from fd_large.ranks import distributed
from fd_large.recipes.sections import Optim


def fails(builder: Any, verbose: bool = False) -> None:
    """Loads nothing."""
    raise RuntimeError("nvcc: no such file")


def taken() -> str:
    """Makes an optimiser as on a GPU."""
    groups = [{"params": [torch.nn.Parameter(torch.zeros(4))]}]
    return type(make_optimizer(groups, Optim(), on_gpu=True)).__name__


def main(folder: str) -> None:
    """Writes what is taken, in the order of the first line."""
    distributed.start()
    start.start()
    with pytest.MonkeyPatch.context() as patch:
        last = distributed.rank() == distributed.world_size() - 1
        fused_adam.install(patch)
        found = [taken()]
        fused_adam.install(patch, wrong=1.01 if last else 1.0)
        found.append(taken())
        fused_adam.install(patch)
        if last:
            patch.setattr(FusedAdamBuilder, "load", fails)
        found.append(taken())
    write_result(folder, found)
    distributed.barrier()


if __name__ == "__main__":
    main(sys.argv[-1])
