"""Vision models of transformers, as the package sees them; transformers is imported when needed."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from fd_large.backbones.family import Family
from fd_large.backbones.transformers.architecture import TransformersArchitecture


def _later(file: str, function: str) -> Callable[..., Any]:
    # transformers takes seconds to import, which other models are spared.
    def call(*arguments: Any) -> Any:
        module = import_module(f"fd_large.backbones.transformers.{file}")
        return getattr(module, function)(*arguments)

    return call


TRANSFORMERS = Family(
    architecture=TransformersArchitecture,
    build=_later("transformers_backbone", "build"),
    matched=_later("published", "matched"),
    facts_of=_later("published", "facts_of"),
    of_config=_later("published", "of_config"),
)
