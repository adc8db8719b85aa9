"""The interface between a backbone family and the rest of the package."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

from fd_large.backbones.exports import Exports
from fd_large.backbones.hierarchical import SizeRule
from fd_large.backbones.initialization import Initialization
from fd_large.backbones.published import Matched, Published, WeightFacts
from fd_large.backbones.statistics import Statistics
from fd_large.backbones.translation import Shapes
from fd_large.backbones.windows import WindowRule
from fd_large.kernels.window_attention_reference import Memory
from fd_large.recipes.architectures import Architecture
from fd_large.recipes.family import FamilyArchitecture
from fd_large.recipes.sections import SIZE_FIELDS


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of a model besides its architecture; a family ignores options it does not need.

    Attributes:
        drop_path_rate: Drop rate of the last block's residual branches, in [0, 1). The rates of the
            blocks rise linearly, from 0 in the first block.
        size_rule: "pad" lets Swin models pad images whose size does not fit. "drop" pads no image,
            and ignores the pixels beyond whole patches.
        window_rule: How a map is cut into windows, see `backbones.windows`; only Swin models have
            another rule than "masked".
        shift_stages: For each stage, whether every second block shifts its windows; empty if blocks
            of all stages do.
        stage_windows: For each stage, the side of a window in tokens; empty if it is `window_size`
            in all stages.
        attention_memory: "keep" stores attention maps until backward; "recompute" computes them
            again in backward.
        sequential_stages: Number of stages, counted from the first, that have the attention maps of
            only a few windows in memory at a time; 0 means no stage.
        is_trained: Whether the model is a student, which has to be deterministic in training.
        resizes_positions: Whether each forward resizes a ViT's positions to the size of the images;
            other families have no such positions.
        residual_dtype: "compute" keeps the residual stream in the dtype of the weights; "float32"
            keeps it in float32 or wider.
        initialization: "fd", "official" or "none" (zeros, for models whose weights are loaded).
    """

    drop_path_rate: float = 0.0
    size_rule: SizeRule = "drop"
    window_rule: WindowRule = "masked"
    shift_stages: tuple[bool, ...] = ()
    stage_windows: tuple[int, ...] = ()
    attention_memory: Memory = "keep"
    sequential_stages: int = 0
    is_trained: bool = False
    resizes_positions: bool = False
    residual_dtype: Literal["float32", "compute"] = "compute"
    initialization: Initialization = "fd"

    def of_all(self) -> dict[str, Any]:
        """Returns {name: value} of the options that every backbone's constructor takes."""
        names = ("drop_path_rate", "attention_memory", "residual_dtype", "initialization")
        return {name: getattr(self, name) for name in names}

    def of_windows(self) -> dict[str, Any]:
        """Returns {name: value} of the options that only Swin models' constructors take."""
        return {name: getattr(self, name) for name in SIZE_FIELDS}


class Loaded(NamedTuple):
    """A module with its weights, and the image statistics of the training, or None if unknown."""

    net: nn.Module
    statistics: Statistics | None


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """How a family reads sources such as `timm:NAME`, whose weights a library or user code brings.

    A source consists of the `prefix` of the family's architecture and a rest. The functions take
    the rest first; the `str` after it is the field that the user set, for messages.

    Attributes:
        settle: Returns (architecture, notes for the log) of a source; its second argument is the
            architecture with the fields that the user set.
        load: Returns the whole module with its weights, and its image statistics if known.
        weightless: Returns {name in the library's module: weight on the meta device}. None if the
            teacher is this module itself, so that its weights are not loaded into another model.
        fetch: Downloads the weights to this machine, so that `load` needs no network. None if
            there is no download.
        save: Writes the whole module with its weights to a folder in the library's format, and
            returns the licence of the weights. None if there is no download.
        untrained: Returns the rest without its ending `=random` (`timm:NAME=random`), or None if
            the source has trained weights.
    """

    settle: Callable[[str, Architecture, str], tuple[Architecture, list[str]]]
    load: Callable[[str, str], Loaded]
    weightless: Callable[[str, str], Mapping[str, Tensor]] | None = None
    fetch: Callable[[str, str], None] | None = None
    save: Callable[[str, str, Path], str] | None = None
    untrained: Callable[[str], str | None] = lambda rest: None


@dataclass(frozen=True, kw_only=True)
class Family:
    """A family of backbones.

    Attributes:
        architecture: Dataclass of the family's architectures, which is known before a model is
            built.
        build: Builds a model, with fresh weights from torch's global CPU generator.
        published: Description of the family's published files; None if their tensor names have no
            common form.
        exports: {export format: description} of the exports to other libraries.
        matched: Matches a model's tensors with those of a file {name: shape}. It is for a family
            without `published`; its last argument is the field that the user set, for messages.
        facts_of: Returns the facts of the published weights of a model that is not a named model,
            or None if they are unknown.
        scheme: How sources that bring a model of the family with its weights are read, or None.
        of_config: Returns the architecture that the contents of a library's `config.json`
            describe, or None if they describe a model of another family; its last argument is the
            field that the user set. The attribute is None if the family has no such files.
        resizes: Returns whether weights of a model can be loaded for another image size.
    """

    architecture: type[FamilyArchitecture]
    build: Callable[[Any, Options], nn.Module]
    published: Published | None = None
    exports: Exports = field(default_factory=dict)
    matched: Callable[[Any, Shapes, str], Matched] | None = None
    facts_of: Callable[[Any], WeightFacts | None] = lambda architecture: None
    scheme: Scheme | None = None
    of_config: Callable[[Mapping[str, Any], str], Architecture | None] | None = None
    resizes: Callable[[Any], bool] = lambda architecture: architecture.resizes_positions
