"""Stand-ins for harmless objects in published files, so that they are read without running code.

Checkpoints carry the settings they were trained with (yacs nodes, argparse namespaces) and numpy
scalars beside their tensors. torch's restricted unpickler is shown plain containers and an empty
class under those names, so that no code of the file, or of the packages it names, runs.
"""

from __future__ import annotations

from collections import OrderedDict
from contextlib import AbstractContextManager
from typing import Any

import torch

# Dictionaries with methods: their items are settings. torch fills no other kind of dictionary.
DICTIONARIES = ("yacs.config.CfgNode", "fvcore.common.config.CfgNode", "addict.addict.Dict")
_PATHS = ("Path", "PosixPath", "PurePosixPath")  # In `_local` as Python 3.13 writes them.
OTHERS = (
    "argparse.Namespace",
    "numpy.core.multiarray.scalar",
    "numpy._core.multiarray.scalar",
    "numpy.dtype",
    *(f"{module}.{name}" for module in ("pathlib", "pathlib._local") for name in _PATHS),
)


class Inert:
    """Takes any arguments and state of a pickled object and keeps none of them."""

    def __new__(cls, *arguments: Any, **options: Any) -> Inert:
        """Takes any arguments."""
        return super().__new__(cls)

    def __init__(self, *arguments: Any, **options: Any):
        """Forgets them."""

    def __setstate__(self, state: Any) -> None:
        """Forgets the state."""


def stand_ins() -> AbstractContextManager[None]:
    """Shows `torch.load(weights_only=True)` the stand-ins while it reads."""
    pairs = [(OrderedDict, name) for name in DICTIONARIES] + [(Inert, name) for name in OTHERS]
    return torch.serialization.safe_globals(pairs)
