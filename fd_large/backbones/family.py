"""What the rest of the package asks of a family of backbones; its folder answers it once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from torch import nn

from fd_large.backbones.hierarchical import SizeRule
from fd_large.backbones.initialization import Initialization
from fd_large.kernels.window_attention_reference import Memory
from fd_large.recipes.family import FamilyArchitecture


@dataclass(frozen=True, kw_only=True)
class Options:
    """How a model is built, beside its architecture; a family ignores what it has no use for.

    Attributes:
        drop_path_rate: Drop path of the last block, in [0, 1); blocks before rise linearly from 0.
        size_rule: "drop" or "pad" image sizes that do not fit; only Swin models pad.
        attention_memory: "keep" or "recompute" attention maps for backward.
        sequential_stages: Number of first stages that hold few windows' maps at a time; 0 is none.
        residual_dtype: "compute" is the dtype of the weights; "float32" is at least that.
        initialization: "fd", "official" or "none" (zeros, for models whose weights are loaded).
    """

    drop_path_rate: float = 0.0
    size_rule: SizeRule = "drop"
    attention_memory: Memory = "keep"
    sequential_stages: int = 0
    residual_dtype: Literal["float32", "compute"] = "compute"
    initialization: Initialization = "fd"


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of backbones.

    Attributes:
        architecture: Its dataclass; what the package asks before a model is built stands there.
        build: Builds a model, with fresh weights from torch's global CPU generator.
    """

    architecture: type[FamilyArchitecture]
    build: Callable[[Any, Options], nn.Module]
