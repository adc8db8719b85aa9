"""Registers the Modules of a task under their names in checkpoints."""

from __future__ import annotations

from torch import nn

from fd_large.errors import ConfigError


def register(task: nn.Module, path: str, module: nn.Module, *, replace: bool = False) -> None:
    """Registers a Module as a submodule of a task, under a dotted path.

    Args:
        task: The task, which gets a ModuleDict for each name of the path but the last.
        path: Path of the submodule in the task, such as heads.NAME.map.
        module: The submodule.
        replace: Whether to replace a submodule that the path already has.

    Raises:
        ConfigError: if a name in the path is an attribute of torch's Modules, or if the path
            already has a submodule and `replace` is False.
    """
    *above, last = path.split(".")
    place = task
    for name in above:
        if not isinstance(getattr(place, name, None), nn.ModuleDict):
            if hasattr(place, name):  # Such as "train" or "keys".
                raise ConfigError(
                    f"teachers.{name}: not a name for a teacher; got the name of a method of "
                    "torch's modules, expected a name that says which teacher it is. Choose "
                    "another name."
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
