"""A model of the user's own as a teacher: a function of the user's returns it, weights and all.

The model maps normalised images (B, 3, H, W) to a `FeatureMap`, and has the attributes `width`
(channels of the map) and `num_prefix_tokens`, and the method `grid(height, width)`. Mean and
deviation of its images may stand in an attribute `statistics` (a `Statistics`).
"""

from __future__ import annotations

from importlib import import_module

from torch import nn

from fd_large.errors import ConfigError

_NEEDED = ("width", "num_prefix_tokens", "grid")


def build_own(function: str, *, where: str = "--teacher.source module") -> nn.Module:
    """Imports `package.file` of `package.file:function`, calls the function, returns the model.

    It is called more than once, also under `torch.device("meta")`, where weights are only shapes.

    Args:
        function: `package.file:function`.
        where: What the user set, for messages.

    Raises: ConfigError: if there is no such function, or what it returns is no such model.
    """
    module_name, _, name = function.partition(":")
    try:
        module = import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"{where}: cannot be imported; got {module_name} ({error}), expected a module on "
            "Python's path. Start from its folder, or set PYTHONPATH."
        ) from error
    make = getattr(module, name, None)
    if not callable(make):
        raise ConfigError(
            f"{where}: no such function in {module_name}; got {name!r}, expected one that returns "
            "a model. Write module:package.file:function."
        )
    net = make()
    lacks = [attribute for attribute in _NEEDED if not hasattr(net, attribute)]
    if not isinstance(net, nn.Module) or lacks:
        raise ConfigError(
            f"{where}: {function} returns no backbone; got {type(net).__name__} without "
            f"{', '.join(lacks) or 'parameters'}, expected a torch Module with "
            f"{', '.join(_NEEDED)}. See fd_large/backbones/custom/custom.py."
        )
    return net
