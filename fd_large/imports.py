"""Functions that clean Python's search path and shorten the time of imports."""

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
    """Removes from Python's path the folder that `python -m` or a script puts first.

    A file in the current folder could replace a module, and may have come with a foreign run
    folder. The folder of this package and the folders in PYTHONPATH stay. An empty part of
    PYTHONPATH, as in `:FOLDER`, means the current folder and is dropped.
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
    """Returns the environment variables for a child process that runs this package.

    The child process finds this package, and no file in the current folder can replace a module.
    """
    paths = filter(None, (_ABOVE, os.environ.get("PYTHONPATH")))
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONSAFEPATH": "1"}


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """Makes imports of some packages fail within the block, as if they were not installed.

    Libraries import optional packages that few users need, and importing such a package takes
    seconds. A package that is already imported can still be imported in the block.

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
    """Excludes the objects that the block's imports create from all garbage collections.

    Importing torch and DeepSpeed creates half a million permanent objects. Garbage collections
    during the import take a quarter of its time, and each later collection would visit all these
    objects again.

    Args:
        package: The largest package that the block imports; if it is already imported, the block
            runs unchanged.
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
