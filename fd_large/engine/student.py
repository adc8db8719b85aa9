"""The student of a recipe: its module, and the weights that it starts from."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fd_large import distributed
from fd_large.backbones.registry import build as build_model
from fd_large.errors import ConfigError
from fd_large.plan.parameters import shapes
from fd_large.recipes.run import Run
from fd_large.weights.source import open_weights


class Precision(NamedTuple):
    """Types that the recipe left to the machine."""

    bfloat16: bool
    teacher: torch.dtype


def precision_of(run: Run) -> Precision:
    """Resolves "auto": bfloat16 on GPUs, float32 on CPUs, where bfloat16 is slower."""
    on_gpu = distributed.device().type == "cuda"
    wanted = run.engine.precision
    bfloat16 = on_gpu if wanted == "auto" else wanted == "bfloat16"
    teacher = run.teacher.dtype
    as_student = torch.bfloat16 if bfloat16 else torch.float32
    return Precision(
        bfloat16,
        {"auto": as_student, "float32": torch.float32, "bfloat16": torch.bfloat16}[teacher],
    )


def node_size_of(run: Run, local_world_size: int) -> int:
    """Ranks of a node: the recipe's, else the launcher's."""
    size = run.engine.node_size or local_world_size
    if distributed.world_size() % size:
        raise ConfigError(
            f"engine.node_size: nodes of unequal size; got {size} for {distributed.world_size()} "
            "ranks, expected a divisor. Set --engine.node_size."
        )
    return size


def build_student(run: Run) -> nn.Module:
    """The recipe's student for its image size, with random weights from torch's generator."""
    architecture = run.student.architecture
    if run.student_architecture().family == "vit":
        architecture = replace(architecture, image_size=run.data.image_size)
    return build_model(
        run.student.model,
        architecture,
        initialization=run.student.initialization,
        drop_path_rate=run.student.drop_path_rate,
        size_rule=run.student.size_rule,
        residual_dtype=run.student.residual_dtype,
        attention_memory=attention_memory(run.student.attention_memory),
    )


def student_weights(run: Run) -> Iterable[tuple[str, Tensor]] | None:
    """(name, tensor) of a settled run's student from `student.init`; None for random weights.

    Raises: WeightsError: if the file does not fit the student.
    """
    if not run.student.init:
        return None
    architecture = run.student_architecture()
    size = run.data.image_size if architecture.family == "vit" else 0
    return open_weights(run.student.init, where="--student.init").fitted(
        architecture,
        shapes(architecture, image_size=size),
        allow=run.student.init_allow,
        where="--student.init",
        remedy="Name the model of the file by --student.model and --student.architecture.*, or set "
        "--student.init_allow NAMES to do without.",
    )


def attention_memory(wanted: str) -> str:
    """Resolves "auto": recomputed on GPUs, kept on CPUs, where that is faster.

    Raises: ConfigError: if the maps would have to be kept on a GPU.
    """
    on_gpu = distributed.device().type == "cuda"
    if wanted == "keep" and on_gpu:
        raise ConfigError(
            "student.attention_memory: keep would hold N x N float32 maps on the GPU; got keep, "
            "expected recompute. Set --student.attention_memory auto."
        )
    if wanted == "auto":
        return "recompute" if on_gpu else "keep"
    return wanted
