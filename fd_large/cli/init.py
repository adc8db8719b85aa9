"""`python -m fd_large init DIR`."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from fd_large import shipped
from fd_large.cli.arguments import parse
from fd_large.errors import ConfigError

# Needs the benchmarks, which only a checkout has.
_OF_A_CHECKOUT = {"throughput.sh"}


@dataclass(frozen=True, kw_only=True)
class Init:
    """Write the Slurm scripts, and site.sh with the settings of your site, to a folder of yours."""

    # The folder; it is made, and files in it that are there already end the command.
    folder: Annotated[str, Positional, arg(metavar="DIR")]


def main(arguments: list[str]) -> int:
    """Writes the files."""
    write(Path(parse(Init, arguments, command="init").folder))
    return 0


def write(folder: Path) -> None:
    """Copies the scripts.

    Raises: ConfigError: if one of them is there already, or the folder cannot be written.
    """
    scripts = sorted(shipped.folder("slurm").glob("*.sh"))
    scripts = [path for path in scripts if path.name not in _OF_A_CHECKOUT]
    there = [path.name for path in scripts if (folder / path.name).exists()]
    if there:
        raise ConfigError(
            f"init: files are there already; got {', '.join(there)} in {folder}, expected none of "
            "them. Name another folder, or move them away."
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in scripts:
            shutil.copy(path, folder)
    except OSError as error:
        raise ConfigError(
            f"init: {folder}: cannot be written; got {error.strerror}, expected a folder of yours. "
            "Name another."
        ) from error
    print(f"{folder}: {', '.join(path.name for path in scripts)}")
    print(
        f"next: fill in {folder / 'site.sh'} (images, teacher, queue, Python), then submit from "
        f"there:\n  cd {folder} && sbatch fd_vit.sh"
    )
