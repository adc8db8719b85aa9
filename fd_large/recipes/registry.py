"""Table of the published recipes by name."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import wraps
from types import ModuleType

from fd_large.errors import ConfigError, nearest
from fd_large.recipes import (
    depth,
    detection,
    distillation,
    distillation_swinv2,
    finetuning,
    linear,
    masked,
    quickstart,
    segmentation,
    several_teachers,
    small_data,
)
from fd_large.recipes.run import Run

_MODULES = (
    quickstart,
    small_data,
    distillation,
    distillation_swinv2,
    several_teachers,
    masked,
    finetuning,
    linear,
    detection,
    segmentation,
    depth,
)


def _recipes_in(module: ModuleType) -> Iterator[Callable[[], Run]]:
    """Yields the public functions of `module` without parameters, each as `_named` makes it."""
    for name, make in vars(module).items():
        is_own = inspect.isfunction(make) and make.__module__ == module.__name__
        if is_own and not name.startswith("_") and not inspect.signature(make).parameters:
            yield _named(make)


def _named(make: Callable[[], Run]) -> Callable[[], Run]:
    """Returns a function like `make`, whose run has the name of the function `make`."""

    @wraps(make)
    def recipe() -> Run:
        return replace(make(), name=make.__name__)

    return recipe


RECIPES = {recipe.__name__: recipe for module in _MODULES for recipe in _recipes_in(module)}

DEFAULT_RECIPE = "quickstart"
# The recipe whose values are the defaults of commands that train named models.
FINETUNING_RECIPE = "finetune_clip_vit_base"


@dataclass(frozen=True, kw_only=True)
class Facts:
    """Facts of a recipe for the table of recipes, each of which is a line of its docstring.

    Duration and memory of a GPU were computed by `plan` for the recipe's own settings on A100s of
    80 GB (or 40 GB, if the line of the hardware says so), in nodes of 8 with eight 100 Gb/s network
    cards, and with the DeepSpeed JSON that the docstring names, or else zero1.json.
    """

    summary: str
    hardware: str
    duration: str
    memory: str
    result: str


def get(name: str, *, where: str = "--recipe") -> Run:
    """Returns the recipe with this name.

    The flag or command `where` gave the name.

    Raises: ConfigError: if no recipe has the name; the message has the nearest names.
    """
    if name not in RECIPES:
        raise ConfigError(
            f"{where}: no such recipe; got {name!r}, {nearest(name, RECIPES)}. Correct the name, "
            "or see python -m fd_large recipes."
        )
    return RECIPES[name]()


def facts(name: str) -> Facts:
    """Returns the facts in the docstring of a recipe.

    The summary is the first line. Each other fact is the first line that begins with its name, such
    as "Memory:", or "" if there is none.
    """
    lines = (inspect.getdoc(RECIPES[name]) or "").splitlines()

    def first(key: str) -> str:
        texts = (line.removeprefix(key).strip() for line in lines if line.startswith(key))
        return next(texts, "")

    return Facts(
        summary=lines[0],
        hardware=first("Hardware:"),
        duration=first("Duration:"),
        memory=first("Memory:"),
        result=first("Result:"),
    )
