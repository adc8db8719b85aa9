"""The command `fd-large init DIR`, which writes the Slurm scripts to a folder."""

from __future__ import annotations

import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from fd_large import shipped
from fd_large.cli.arguments import parse
from fd_large.errors import ConfigError, first_names
from fd_large.files import unusable

# Needs the benchmarks, which only a checkout has.
_OF_A_CHECKOUT = {"throughput.sh"}


@dataclass(frozen=True, kw_only=True)
class Init:
    """Write the Slurm scripts, and site.sh with the settings of your site, to your own folder."""

    # Folder to which the scripts are written. It must be empty, or is made if it does not exist.
    folder: Annotated[str, Positional, arg(metavar="DIR")]


def main(arguments: list[str]) -> int:
    """Writes the Slurm scripts to the folder in `arguments`, those after `init`; returns 0."""
    write(Path(parse(Init, arguments, command="init").folder))
    return 0


def write(folder: Path) -> None:
    """Copies the Slurm scripts to `folder`, made if it is missing, and prints the next commands.

    Raises: ConfigError: if the folder is not empty, or cannot be written.
    """
    scripts = sorted(shipped.folder("slurm").glob("*.sh"))
    scripts = [path for path in scripts if path.name not in _OF_A_CHECKOUT]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if there := sorted(name for name in os.listdir(folder) if not name.startswith(".")):
            raise ConfigError(
                f"init: {folder}: not empty; got {first_names(there, 5)}, expected a new or empty "
                "folder. Name another folder."
            )
        for path in scripts:
            shutil.copy(path, folder)
    except OSError as error:
        raise unusable("init", error, folder) from error
    print(f"{folder}: {', '.join(path.name for path in scripts)}")
    print(
        f"next: fill in {folder / 'site.sh'} (images, teacher, queue, Python), then submit from "
        f"there:\n  cd {folder} && sbatch fd_vit.sh"
    )
