"""Which of DeepSpeed's compiled operations this machine can build, and which are built."""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

from fd_large.engine.zero.private_names import get

# FusedAdam steps the masters on GPUs; a DeepSpeed JSON may turn on the others.
NAMES = ("FusedAdam", "CPUAdam", "AsyncIO")


class Op(NamedTuple):
    """One operation.

    Attributes:
        name: DeepSpeed's name of it.
        buildable: Whether compiler and libraries are there, as far as DeepSpeed looks.
        built: Whether its library is ready: installed, or left by an earlier run.
    """

    name: str
    buildable: bool
    built: bool


def ops() -> list[Op]:
    """Asks the builder of each operation; compiles nothing."""
    installed_ops = get("deepspeed.git_version_info:installed_ops")
    default = get("torch.utils.cpp_extension:get_default_build_root")
    root = Path(os.environ.get("TORCH_EXTENSIONS_DIR") or default())
    found = []
    for name in NAMES:
        builder = get(f"deepspeed.ops.op_builder:{name}Builder")()
        try:
            buildable = bool(builder.is_compatible(verbose=False))
        except Exception:  # DeepSpeed raises many kinds, all of which mean that it cannot.
            buildable = False
        built = bool(installed_ops.get(builder.name)) or any(root.glob(f"**/{builder.name}.so"))
        found.append(Op(name, buildable, built))
    return found
