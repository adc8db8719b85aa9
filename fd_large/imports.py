"""Imports: Python's search path, and shorter import times."""

from __future__ import annotations

import atexit
import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PACKAGE = os.path.dirname(os.path.realpath(__file__))
_ABOVE = os.path.dirname(_PACKAGE)


def forget_current_folder() -> None:
    """Removes from Python's path the folder that `-m` or a script puts first.

    A file there could replace a module, and may have come with a foreign run folder. The folder
    of this package stays, and so do the folders in PYTHONPATH; an empty part of it, as in
    `:FOLDER`, means the current folder and is dropped.
    """
    started_in = {_PACKAGE, os.path.realpath(os.curdir)}
    if not sys.flags.safe_path and sys.path and os.path.realpath(sys.path[0]) in started_in:
        del sys.path[0]
    paths = os.environ.get("PYTHONPATH", "").split(os.pathsep)
    named = list(filter(None, paths))
    if named and len(named) < len(paths):
        os.environ["PYTHONPATH"] = os.pathsep.join(named)  # Other programs inherit it.
        here = os.path.realpath(os.curdir)
        if here not in map(os.path.realpath, named):
            sys.path[:] = [path for path in sys.path if os.path.realpath(path) != here]
    if _ABOVE not in map(os.path.realpath, sys.path):
        sys.path.insert(0, _ABOVE)


def environ_of_program() -> dict[str, str]:
    """Returns the environment for a program of this package that this process starts.

    The program finds this package, and no file in the current folder can replace a module.
    """
    paths = filter(None, (_ABOVE, os.environ.get("PYTHONPATH")))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """Runs the imports of the block as if some packages were not installed.

    Libraries import optional packages that few users need and that take seconds. An already
    imported package stays.

    Args:
        packages: Names of the packages.
    """
    unseen = [name for name in packages if name not in sys.modules]
    for name in unseen:
        sys.modules[name] = None  # type: ignore[assignment]  # As Python marks what is not there.
    try:
        yield
    finally:
        for name in unseen:
            del sys.modules[name]


@contextmanager
def for_good(package: str) -> Iterator[None]:
    """Excludes objects imported in the block from garbage collection, now and later.

    Torch, DeepSpeed and their imports are half a million permanent objects. Collections during
    the import take a quarter of its time, and each later collection would visit all objects
    again.

    Args:
        package: The largest imported package; if it is already imported, this does nothing.
    """
    if package in sys.modules:
        yield
        return
    collects = gc.isenabled()
    gc.collect()  # The caller's garbage is not to stay.
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        # Triton complains at length of what is still hidden when the interpreter ends.
        atexit.register(gc.unfreeze)
        if collects:
            gc.enable()
