"""Rank program: ten steps under ZeRO-3 with weights gathered exactly and in 8 bits (qwZ).

quantised.py FOLDER writes the losses of both. DeepSpeed compiles its quantiser for CUDA alone; here
a plain twin of its arithmetic stands in (csrc/includes/quantization_utils.h, DeepSpeed 0.19.8).
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import tiny_runs
import torch
from deepspeed.runtime.zero.partition_parameters import CUDAQuantizer
from launch import write_result
from torch import Tensor

from fd_large.data.loader import Batch
from fd_large.engine.forward_backward import forward_backward
from fd_large.engine.opening import engine_of
from fd_large.engine.zero import compiled_ops, start
from fd_large.engine.zero import config as ds
from fd_large.engine.zero.optimizer import set_learning_rate
from fd_large.ranks import distributed
from fd_large.recipes.sections import Student
from fd_large.tasks.distillation.job import DistillationJob

ROOT = Path(__file__).resolve().parents[3]
STEPS = 10


class Twin:
    """Symmetric 8 bits in groups: x * 256 / (2 max), rounded, kept within -128 .. 127."""

    Symmetric = None

    def quantize(self, values: Tensor, groups: int, bits: int, _: Any) -> tuple[Tensor, Tensor]:
        rows = values.float().view(groups, -1)
        largest = rows.abs().amax(1, keepdim=True)
        scale = torch.where(largest == 0, 1.0, 2**bits / (2 * largest))
        whole = (rows * scale).round().clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return whole.to(torch.int8).view(values.shape), 1 / scale

    def dequantize(self, whole: Tensor, scales: Tensor, groups: int, bits: int, _: Any) -> Tensor:
        rows = whole.float().view(groups, -1) * scales.view(groups, 1)
        return rows.half().view(whole.shape)


def losses(*, quantised: bool) -> list[float]:
    """Returns the mean loss of all ranks, by step."""
    run = tiny_runs.tiny_run()
    # A ViT, all of whose tensors split into groups of 8.
    student = Student(model="clip_vit_base_patch16", architecture=tiny_runs.VIT)
    run = replace(run, student=student)
    config = json.loads((ROOT / "ds_configs/zero3.json").read_text())
    # All matrices are split, small as they are here.
    config["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 0,
        "zero_quantized_weights": quantised,
    }
    job = DistillationJob(run)
    job.build(bfloat16=False, node_size=2, persistence_threshold=0)
    numbers = ds.RunNumbers(
        4,
        1,
        2,
        2,
        run.optim.clip_norm,
        False,
        sum(job.tensor_sizes(), ()),
        trained_sizes=job.tensor_sizes().trained,
    )
    engine = engine_of(run, job.make_task, ds.fill(config, numbers))
    engine.task.train()
    generator = torch.Generator().manual_seed(distributed.rank())
    positions = torch.arange(4) + 4 * distributed.rank()
    found = []
    for _ in range(STEPS):
        images = torch.randint(0, 256, (4, 3, 32, 32), dtype=torch.uint8, generator=generator)
        set_learning_rate(engine.deepspeed.optimizer, 1e-3)
        loss = forward_backward(engine, Batch(images, 0, positions, positions), 0)
        engine.deepspeed.step()
        found.append((distributed.sum_tensor(loss) / 2).item())
    return found


def main(folder: Path) -> None:
    distributed.start()
    start.start()
    compiled_ops.load = lambda name: None
    CUDAQuantizer.quantizer_cuda_module = Twin()
    write_result(folder, {"exact": losses(quantised=False), "eight_bits": losses(quantised=True)})
    distributed.barrier()


if __name__ == "__main__":
    main(Path(sys.argv[-1]))
