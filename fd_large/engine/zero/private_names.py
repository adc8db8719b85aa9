"""The private names of DeepSpeed, torch and torchvision that this package reads or replaces.

Code takes a private class, function or global by `get`, and replaces a method or a value by
`replace`. pyproject.toml pins DeepSpeed to one release, and a launch refuses any other.
tests/unit/engine/zero/test_private_names.py lists the private names of that release that are used,
and fails if the package uses another. torch and torchvision may be newer releases, if their
functions still have the parameters that are used.
"""

from __future__ import annotations

import inspect
from importlib.metadata import version
from pkgutil import resolve_name
from typing import Any

from fd_large.errors import VersionError

TESTED = {"deepspeed": "0.19.8", "torch": "2.13.0", "torchvision": "0.28.0"}
"""The versions that this package was written against."""

_BOXES = "torchvision.models.detection._utils"
_ANCHORS = "torchvision.models.detection.anchor_utils:AnchorGenerator"

PARAMETERS = {
    # torch 2.13 and later have these.
    "torch:compile": ("recompile_limit", "isolate_recompiles"),
    # The inner optimiser's own step, which the gate replaces.
    "torch.optim.optimizer:Optimizer.step": ("self", "closure"),
    # The heads of detection are made of these.
    f"{_BOXES}:BoxCoder": ("weights", "bbox_xform_clip"),
    f"{_BOXES}:BoxCoder.encode_single": ("self", "reference_boxes", "proposals"),
    f"{_BOXES}:BoxCoder.decode_single": ("self", "rel_codes", "boxes"),
    f"{_BOXES}:Matcher": ("high_threshold", "low_threshold", "allow_low_quality_matches"),
    _ANCHORS: ("sizes", "aspect_ratios"),
    f"{_ANCHORS}.grid_anchors": ("self", "grid_sizes", "strides"),
    "torchvision.ops.poolers:LevelMapper": (
        *("k_min", "k_max", "canonical_scale", "canonical_level", "eps"),
    ),
}
"""{MODULE:NAME in torch or torchvision: parameters that the function must have}."""


def check() -> None:
    """Checks DeepSpeed's version and torch's names; `get` checks torchvision's.

    Raises:
        VersionError: If DeepSpeed is another release, or a name of torch is missing or lacks
            parameters.
    """
    installed, tested = version("deepspeed"), TESTED["deepspeed"]
    if installed.partition("+")[0] != tested:  # A build of one's own has a commit after the +.
        raise _refused("the set of private names", f"another release ({installed})", "deepspeed")
    for path in PARAMETERS:
        if not path.startswith("torchvision."):
            get(path)


def get(path: str) -> Any:
    """Returns the private class, function or global MODULE:NAME.

    Raises: VersionError: if it does not exist or lacks a parameter that `PARAMETERS` lists for it.
    """
    package = path.partition(":")[0].partition(".")[0]
    for part, parameters in PARAMETERS.items():
        if part == path or part.startswith(f"{path}."):
            missing = set(parameters) - {*inspect.signature(_found(part, package)).parameters}
            if missing:
                names = ", ".join(sorted(missing))
                raise _refused(part, f"parameters without {names}", package)
    return _found(path, package)


def replace(owner: Any, name: str, new: Any) -> Any:
    """Replaces an existing method or value of an object or module, and returns the old one.

    A private name of DeepSpeed must be listed in tests/unit/engine/zero/test_private_names.py.

    Raises: VersionError: if the owner lacks the name.
    """
    try:
        old = getattr(owner, name)
    except AttributeError:
        raise _refused(f"{type(owner).__name__}.{name}", "no such name", "deepspeed") from None
    setattr(owner, name, new)
    return old


def check_optimizer(optimizer: Any, inner: Any, wrapper: str | None) -> None:
    """Checks that an engine steps the optimiser that was passed to it.

    Args:
        optimizer: The engine's optimiser.
        inner: The optimiser that was passed to the engine.
        wrapper: Name of the class in which DeepSpeed wraps `inner`; None if it does not wrap it.

    Raises: VersionError: if the engine steps another optimiser.
    """
    steps = optimizer if wrapper is None else getattr(optimizer, "optimizer", None)
    if steps is not inner or wrapper not in (None, type(optimizer).__name__):
        raise _refused(
            f"the optimiser {wrapper or 'itself'} of {type(inner).__name__}",
            f"{type(optimizer).__name__} of {type(steps).__name__}",
            "deepspeed",
        )


def _found(path: str, package: str) -> Any:
    try:
        return resolve_name(path)
    except (ImportError, AttributeError):
        raise _refused(path, "no such name", package) from None


def _refused(path: str, got: str, package: str) -> VersionError:
    tested = TESTED[package]
    return VersionError(
        f"{package} {version(package)}: {path.rpartition(':')[2]} differs from the version that "
        f"fd_large needs; got {got}, expected the form of {package} {tested}. Run pip install "
        f"'{package}=={tested}'."
    )
