"""fd_large: feature distillation of vision backbones with up to three billion parameters.

    import fd_large

    result = fd_large.distill(data="photos/", teacher="timm:vit_small_patch16_224", out="runs/a")
    model = fd_large.load_student("runs/a")

The public names are imported on first use (docs/python.md).
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from fd_large.api import (
        Evaluation,
        Result,
        distill,
        evaluate,
        load_student,
        recipe,
        result,
    )
    from fd_large.errors import FDError
    from fd_large.recipes.registry import RECIPES
    from fd_large.recipes.run import Run

__version__ = "0.9.0"

_FROM = {
    **dict.fromkeys(
        ("Evaluation", "Result", "distill", "evaluate", "load_student", "recipe", "result"),
        "fd_large.api",
    ),
    "FDError": "fd_large.errors",
    "RECIPES": "fd_large.recipes.registry",
    "Run": "fd_large.recipes.run",
}

__all__ = [
    "RECIPES",
    "Evaluation",
    "FDError",
    "Result",
    "Run",
    "__version__",
    "distill",
    "evaluate",
    "load_student",
    "recipe",
    "result",
]


def __getattr__(name: str) -> Any:
    if name not in _FROM:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_FROM[name]), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *_FROM})
