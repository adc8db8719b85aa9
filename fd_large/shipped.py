"""Files that travel with the package: DeepSpeed configurations and Slurm scripts.

In a checkout they are at the top level, in an installed package inside of it.
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
    """Returns the file that `--deepspeed_config` means: a path, or a name such as zero3.

    Raises: ConfigError: if there is neither.
    """
    if kind_of(Path(config)) == "file":
        return Path(config)
    shipped = {path.stem: path for path in sorted(folder("ds_configs").glob("*.json"))}
    # A path of the repository's, given where there is only the package.
    name = config.removeprefix("ds_configs/").removesuffix(".json")
    if name not in shipped:
        raise ConfigError(
            f"--deepspeed_config: no such file; got {config or 'nothing'}, expected the path of a "
            f"JSON or a name: {nearest(name, shipped)}. Name one, for example zero3."
        )
    return shipped[name]
