"""Backbones of timm, as the package sees them; timm is imported only where it is needed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from fd_large.backbones.exports import Export, feature_distillation, same
from fd_large.backbones.family import Family, Scheme
from fd_large.backbones.timm.architecture import TimmArchitecture
from fd_large.imports import without

_RANDOM = "=random"


def _untrained(rest: str) -> str | None:
    return rest.removesuffix(_RANDOM) if rest.endswith(_RANDOM) else None


def _later(file: str, function: str) -> Callable[..., Any]:
    # timm takes a second to import, which other models are spared.
    def call(*arguments: Any) -> Any:
        # Its training script's log asks for Weights & Biases, a third of that second.
        with without("wandb"):
            module = import_module(f"fd_large.backbones.timm.{file}")
        return getattr(module, function)(*arguments)

    return call


TIMM = Family(
    architecture=TimmArchitecture,
    build=_later("timm_backbone", "build"),
    matched=_later("published", "matched"),
    facts_of=_later("published", "facts_of"),
    of_config=_later("published", "of_config"),
    exports={
        "timm": Export(
            names=lambda a: f"those of timm's {a.timm_name}",
            outputs=lambda name, shape, a: same(name.removeprefix("net."), shape),
            lacks=_later("export", "lacks"),
            added=_later("export", "added"),
            config=_later("export", "config"),
            class_name=_later("export", "class_name"),
        ),
        "fd": Export(
            names=lambda a: f"Feature-Distillation's, around those of timm's {a.timm_name}",
            outputs=lambda name, shape, a: feature_distillation(name.removeprefix("net."), shape),
        ),
    },
    scheme=Scheme(
        settle=_later("published", "settle"),
        load=_later("published", "load"),
        fetch=_later("published", "fetch"),
        save=_later("published", "save"),
        weightless=_later("published", "weightless"),
        untrained=_untrained,
    ),
    resizes=_later("published", "resizes"),
)
