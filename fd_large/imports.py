"""Imports that take up less than a library asks for."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without(*packages: str) -> Iterator[None]:
    """Lets what is imported within go as where some packages are not installed.

    Libraries ask for packages that only a few of their users want, whose imports take seconds. A
    package that is imported already stays.

    Args:
        packages: Their names.
    """
    unseen = [name for name in packages if name not in sys.modules]
    for name in unseen:
        sys.modules[name] = None  # type: ignore[assignment]  # As Python marks what is not there.
    try:
        yield
    finally:
        for name in unseen:
            del sys.modules[name]
