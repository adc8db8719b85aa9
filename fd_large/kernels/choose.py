"""One place that says which implementation of an operation runs.

`FD_KERNELS` holds the wish: `reference` (default) or `apex`. Asking for something that is not
there is an error, never a silent fallback.
"""

from __future__ import annotations

import importlib
import os
from collections.abc import Callable
from functools import lru_cache
from importlib.util import find_spec

from fd_large.errors import ConfigError, nearest

# apex's fused kernels exist for CUDA only; elsewhere the reference runs.
APEX_DEVICES = ("cuda",)
_IMPLEMENTATIONS = ("reference", "apex")


def wished() -> str:
    """Returns the value of FD_KERNELS, `reference` where it is not set.

    Raises: ConfigError: if the value is none of the known implementations.
    """
    wish = os.environ.get("FD_KERNELS", "") or "reference"
    if wish not in _IMPLEMENTATIONS:
        raise ConfigError(
            f"FD_KERNELS: no such implementation; got {wish!r}, {nearest(wish, _IMPLEMENTATIONS)}."
            " Set it to one of these or unset it."
        )
    return wish


def implementation(device_type: str) -> str:
    """Returns which LayerNorm runs on a device: `reference` or `apex`.

    Raises: ConfigError: if apex is wished for on a device that it has no kernel for.
    """
    wish = wished()
    if wish == "apex" and device_type not in (*APEX_DEVICES, "meta"):
        raise ConfigError(
            f"FD_KERNELS: apex has no kernel for this device; got {device_type}, expected "
            f"{' or '.join(APEX_DEVICES)}. Unset FD_KERNELS here."
        )
    return "apex" if wish == "apex" and device_type in APEX_DEVICES else "reference"


def has_nvidia_apex() -> bool:
    """Says whether NVIDIA apex is installed.

    The package named `apex` on the index is another project: NVIDIA's is known by FusedLayerNorm
    and FusedAdam.
    """
    if find_spec("apex") is None:
        return False
    try:
        normalization = importlib.import_module("apex.normalization")
        optimizers = importlib.import_module("apex.optimizers")
    except ImportError:
        return False
    return hasattr(normalization, "FusedLayerNorm") and hasattr(optimizers, "FusedAdam")


@lru_cache(maxsize=1)
def apex_layer_norm() -> Callable:
    """Returns NVIDIA apex's fused affine LayerNorm function.

    Raises: ConfigError: if NVIDIA apex is not installed.
    """
    if has_nvidia_apex():
        module = importlib.import_module("apex.normalization.fused_layer_norm")
        return module.fused_layer_norm_affine
    raise ConfigError(
        "FD_KERNELS=apex: NVIDIA apex is not installed (found by FusedLayerNorm and FusedAdam; the "
        "package of that name on the index is another project); got none, expected "
        "apex.normalization.FusedLayerNorm. Build it from NVIDIA's source or unset FD_KERNELS."
    )
