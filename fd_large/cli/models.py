"""The command `fd-large models [PART]`, which lists models."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

from fd_large.backbones.timm.architecture import TimmArchitecture, why_refused
from fd_large.cli.arguments import parse
from fd_large.cli.output import tables
from fd_large.errors import ConfigError
from fd_large.ranks import activity
from fd_large.recipes.architectures import ARCHITECTURES, FAMILIES

if TYPE_CHECKING:
    from rich.table import Table

_OTHERS = """\
timm:NAME            any model of timm; `models PART` lists names that have PART
module:FILE.py:NAME  a model made by your own code (docs/extending.md)
auto                 for a teacher: the model of its weights (docs/weights.md)"""


@dataclass(frozen=True, kw_only=True)
class Models:
    """List the names of models for students and teachers."""

    # Part of a name. If it is given, all models whose names contain it are listed, including
    # timm's.
    part: Annotated[str, Positional, arg(metavar="[PART]")] = ""


def main(arguments: list[str]) -> int:
    """Prints a table of this package's models, or with PART the names that contain it.

    The name of a model that no recipe accepts is followed by the reason.
    """
    options = parse(Models, arguments, command="models")
    if options.part:
        for name in matching(options.part):
            reason = why_refused(name.removeprefix(TimmArchitecture.prefix))
            print(f"{name}  ({reason})" if reason else name)
    else:
        tables().print(models_table())
        print(_OTHERS)
    return 0


def matching(part: str) -> list[str]:
    """Returns the names of all models, timm's included, that contain the text `part`.

    Upper and lower case do not matter.

    Raises: ConfigError: if no name contains `part`.
    """
    with activity.work("loading timm"):  # It imports torch, which takes seconds.
        import timm
    theirs = (f"{TimmArchitecture.prefix}{name}" for name in timm.list_models())
    names = [*ARCHITECTURES, *theirs]
    matches = [name for name in names if part.lower() in name.lower()]
    if not matches:
        raise ConfigError(
            f"models: no matching name; got {part!r}, expected a part of a model's name, such as "
            "convnext. Leave the part out to list all models except timm's."
        )
    return matches


def models_table() -> Table:
    """Returns a table of this package's models with their families and shapes."""
    from rich.table import Table

    table = Table(title="Models (--student.model, --teacher.model)", title_justify="left")
    table.add_column("Model", no_wrap=True)
    table.add_column("Family and shape", ratio=1)
    for name, model in ARCHITECTURES.items():
        if name not in FAMILIES:  # Which stands for any model of the family.
            shape = "; ".join(f"{label} {value}" for label, value in model.summary().items())
            table.add_row(name, f"{model.family}: {shape}" if shape else model.own_name)
    return table
