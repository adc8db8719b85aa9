"""Imports a family's files only when they are needed, since some libraries import for seconds."""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from typing import Any

from fd_large.imports import for_good, without


def later(folder: str, file: str, function: str, *, hides: tuple[str, ...] = ()) -> Callable:
    """Returns a function that imports a family's file, and calls a function of the file.

    The file is imported only when the returned function is called. The returned function passes its
    positional arguments to the file's function, and returns the result.

    Args:
        folder: Name of the family's folder, which is also the name of the library that it uses.
        file: Name of the file in the folder, without `.py`.
        function: Name of the function in the file.
        hides: Optional packages that are hidden during the import, to save time.
    """

    def call(*arguments: Any) -> Any:
        with without(*hides), for_good(folder):
            module = import_module(f"fd_large.backbones.{folder}.{file}")
        return getattr(module, function)(*arguments)

    return call
