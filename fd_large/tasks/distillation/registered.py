"""Modules of a task, registered under their names in checkpoints."""

from __future__ import annotations

from torch import nn

from fd_large.errors import ConfigError


def register(task: nn.Module, path: str, module: nn.Module, *, replace: bool = False) -> None:
    """Registers a Module under a path.

    Args:
        task: The Module that the new Module joins.
        path: Its name, such as heads.NAME.map, with a ModuleDict for each part but the last.
        module: The Module.
        replace: Whether to replace a Module that is already registered.

    Raises: ConfigError: if a part of the path is a teacher's name that torch's modules use, or if
        the path is taken.
    """
    *above, last = path.split(".")
    place = task
    for name in above:
        if not isinstance(getattr(place, name, None), nn.ModuleDict):
            if hasattr(place, name):  # Such as "train" or "keys".
                raise ConfigError(
                    f"teachers.{name}: not a name for a teacher; got the name of a method of "
                    "torch's modules, expected a name that says which teacher it is. Choose "
                    "another one."
                )
            place.add_module(name, nn.ModuleDict())
        place = getattr(place, name)
    if last in place._modules and not replace:
        raise ConfigError(
            f"targets: two Modules with the same name; got {path!r} twice, expected a name for "
            "each. Give the second Target another label and path."
        )
    place._modules.pop(last, None)
    place.add_module(last, module)
