"""Paths of the package's data files: DeepSpeed configurations and Slurm scripts.

The files are at the top level of a checkout, and inside the package if it is installed.
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from fd_large.errors import ConfigError, nearest
from fd_large.files import kind_of

_PACKAGE = Path(__file__).resolve().parent


def folder(name: Literal["ds_configs", "slurm"]) -> Path:
    """Returns the folder of the DeepSpeed configurations, or of the Slurm scripts."""
    inside = _PACKAGE / name
    return inside if kind_of(inside) == "folder" else _PACKAGE.parent / name


def deepspeed_config(config: str) -> Path:
    """Returns the path of the JSON file that `--deepspeed_config` names.

    Args:
        config: Path of a JSON file, or the name of a file of the package, such as zero3.

    Raises: ConfigError: if there is no such file and no such name.
    """
    if kind_of(Path(config)) == "file":
        return Path(config)
    shipped = {path.stem: path for path in sorted(folder("ds_configs").glob("*.json"))}
    # A path of the repository's, given where there is only the package.
    name = config.removeprefix("ds_configs/").removesuffix(".json")
    if name not in shipped:
        raise ConfigError(
            f"--deepspeed_config: no such file; got {config or 'nothing'}, expected the path of a "
            f"JSON or a name: {nearest(name, shipped)}. Set --deepspeed_config, for example to "
            "zero3."
        )
    return shipped[name]
