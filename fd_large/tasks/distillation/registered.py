"""Modules of a task under the names that checkpoints have."""

from __future__ import annotations

from torch import nn

from fd_large.errors import ConfigError


def register(task: nn.Module, path: str, module: nn.Module) -> None:
    """Registers a Module under a path, in place of one that may be there.

    Args:
        task: The Module that gets it.
        path: Its name, such as heads.NAME.map, with a ModuleDict for each part but the last.
        module: The Module.

    Raises: ConfigError: if a part of the path is a teacher's name that torch's modules use.
    """
    *above, last = path.split(".")
    place = task
    for name in above:
        if not isinstance(getattr(place, name, None), nn.ModuleDict):
            if hasattr(place, name):  # Such as "train" or "keys".
                raise ConfigError(
                    f"teachers.{name}: not a name for a teacher; got what torch's modules call a "
                    "method of theirs, expected a name that says which teacher it is. Choose "
                    "another one."
                )
            place.add_module(name, nn.ModuleDict())
        place = getattr(place, name)
    place._modules.pop(last, None)
    place.add_module(last, module)
