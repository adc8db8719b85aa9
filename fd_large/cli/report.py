"""The command `fd-large report RUN`, which draws a run's curves."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from tyro.conf import Positional, arg

from fd_large.checkpoint.lease import living_owner
from fd_large.cli.arguments import parse


@dataclass(frozen=True, kw_only=True)
class Report:
    """Draw a run's curves and summarise its results, from the files in its folder."""

    # Folder of the run, for example runs/quickstart.
    run: Annotated[str, Positional, arg(metavar="RUN")]


def main(arguments: list[str]) -> int:
    """Draws the curves of a run, writes its report and prints its results; returns the exit code.

    Args:
        arguments: The arguments after `report`, which name the run.
    """
    options = parse(Report, arguments, command="report")
    from fd_large.report.make import make_report

    print(make_report(options.run, running=living_owner(Path(options.run)) is not None))
    return 0
