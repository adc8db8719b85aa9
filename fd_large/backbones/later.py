"""Imports the files of families late, since some libraries take seconds to import."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from fd_large.imports import for_good, without


def later(folder: str, file: str, function: str, *, hides: tuple[str, ...] = ()) -> Callable:
    """Returns a stand-in for a function of a family's file, which imports the file when called.

    Args:
        folder: The family's folder, of the same name as its library.
        file: The file in it, without its ending.
        function: Name of the function.
        hides: Packages that the import is to go without.
    """

    def call(*arguments: Any) -> Any:
        with without(*hides), for_good(folder):
            module = import_module(f"fd_large.backbones.{folder}.{file}")
        return getattr(module, function)(*arguments)

    return call
