"""Prints the help of a command, by tyro: its own flags, and sections of the recipe on request.

A recipe has some three hundred fields. A command whose flags are mostly these fields (`train`)
shows one screen with the most common fields and the names of the sections. `--help SECTION` shows a
section in full, and `--help all` shows all sections.
"""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import MISSING, field, fields, is_dataclass, make_dataclass
from inspect import getdoc
from operator import attrgetter
from pathlib import Path
from typing import Annotated, Any

from fd_large.recipes.fields import entry_type, field_names, hints_of
from fd_large.recipes.run import Run, Task
from fd_large.tasks.registry import TASKS

ALL = "all"


def program(command: str) -> str:
    """Returns `command` after the name of the program that the user called.

    The program is `fd-large`, or in all other cases `python -m fd_large`.
    """
    script = Path(sys.argv[0]).name
    return f"{script if script == 'fd-large' else 'python -m fd_large'} {command}".strip()


def required(kind: type, prefix: str = "") -> Iterator[str]:
    """Yields the full names of a dataclass's fields without a default, nested ones as NAME.FIELD.

    Each name begins with `prefix`.
    """
    for argument in fields(kind):
        hint = hints_of(kind)[argument.name]
        if argument.default is not MISSING or argument.default_factory is not MISSING:
            continue
        if isinstance(hint, type) and is_dataclass(hint):
            yield from required(hint, f"{prefix}{argument.name}.")
        else:
            yield prefix + argument.name


def sections_of(task: type[Task]) -> dict[str, Any]:
    """Returns a recipe's sections and subsections, {"optim": type, "task.detection": type, ...}.

    Args:
        task: Class of the section `task`; a task of the user's own adds a subsection to it.
    """
    return dict(_parts(hints_of(Run) | {"task": task}))


def section_named(typed: str, task: type[Task]) -> str:
    """Returns the section that the text `typed` after --help names, or "" if there is none.

    The name of a field gives its section, as "optim" for "optim.eps".
    """
    known = sections_of(task).keys() | {ALL}
    name = typed.replace("-", "_")
    while name and name not in known:
        name = name.rpartition(".")[0]
    return name


def print_own(kind: type, command: str, *, of_recipe: bool) -> None:
    """Prints a command's own arguments, the fields of the dataclass `kind`, in full.

    If the fields of a recipe are flags, too (`of_recipe`), the help mentions them.
    """
    _print_by_tyro(kind, command, getdoc(kind) or "")
    if of_recipe:
        names = ", ".join(name for name in sections_of(Task) if "." not in name)
        print(
            _filled(
                "Fields of the recipe are flags, too: see --help SECTION, with SECTION one "
                f"of {names}."
            )
        )


def print_sections(kind: type, command: str, base: Run, task: type[Task], section: str) -> None:
    """Prints all flags of a section, or of all sections, with the values of the recipe `base`.

    Args:
        kind: The dataclass of the command's own arguments, which are printed as well for `ALL`.
        base: The recipe.
        task: As in `sections_of`.
        section: A key of `sections_of`, or `ALL`.
    """
    import tyro

    sections, text = sections_of(task), f"Flags of {section}, with the values of {base.name}."
    names, shown = [section], {}
    if section == ALL:
        names, text = [name for name in sections if "." not in name], getdoc(kind) or ""
        values = dict.fromkeys(required(kind), tyro.MISSING)
        values |= dict.fromkeys(field_names(kind).keys() & {"recipe"}, base.name)
        shown[""] = kind, field(default=kind(**values))
    for name in names:
        if entry := entry_type(sections[name]):  # An entry of the dict, which is called NAME.
            shown[name] = make_dataclass("Entries", [("NAME", entry)]), field()
        else:
            shown[name] = sections[name], field(default=attrgetter(name)(base))
    parts = [
        (f"part_{number}", Annotated[hint, tyro.conf.arg(name=name)], default)
        for number, (name, (hint, default)) in enumerate(shown.items())
    ]
    _print_by_tyro(make_dataclass("Shown", parts, frozen=True, kw_only=True), command, text)


def print_overview(
    kind: type, command: str, base: Run, task: type[Task], often: Mapping[str, str]
) -> None:
    """Prints the most common flags and the names of the sections, on one screen.

    Args:
        kind: The dataclass of the command's own arguments.
        base: The recipe whose values are shown, and whose task decides which sections are listed.
        task: As in `sections_of`.
        often: {flag: description}, of the command's own flags and of fields of the recipe.
    """
    sections, read = sections_of(task), _read_by(base.task)
    command_flags, flags, about = {}, {}, {}
    for name, text in often.items():
        if name in field_names(kind):
            command_flags[f"--{name}"] = text
        elif name.partition(".")[0] in read:
            value = attrgetter(name)(base)
            default = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
            flags[f"--{name}"] = f"{text} ({default})" if default else text
    for name in read:
        text = (getdoc(entry_type(sections[name]) or sections[name]) or "").partition(".")[0]
        parts = [part for part in sections if part.rpartition(".")[0] == name]
        about[name] = f"{text}; also {', '.join(parts)}" if parts else text
    required_flags = "".join(f" --{name} VALUE" for name in required(kind))
    print(f"usage: {program(command)} [--help [SECTION]]{required_flags} [--FLAG VALUE ...]\n")
    print(_filled(getdoc(kind) or ""))
    width = max(map(len, command_flags | flags))
    _print_rows("flags of the command", command_flags, width)
    _print_rows(f"flags of the recipe that are set often (values of {base.name})", flags, width)
    _print_rows(
        f"sections of the recipe; {command} --help SECTION, or {ALL}, lists every flag", about
    )


# ------------------------------------------------------------------------------------------------


def _parts(hints: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, hint in hints.items():
        if entry_type(hint):
            yield prefix + name, hint
        elif isinstance(hint, type) and is_dataclass(hint):
            yield prefix + name, hint
            yield from _parts(hints_of(hint), f"{prefix}{name}.")


def _read_by(task: Task) -> list[str]:
    """Returns the names of the recipe's sections, without subsections, that the task `task` reads.

    All sections are returned for a task of the user's own whose code is not imported.
    """
    kind = task.kind()
    of_tasks = {name for other in TASKS.values() for name in other.sections}
    unread = of_tasks.difference(kind.sections) if kind else set()
    return [name for name in sections_of(Task) if "." not in name and name not in unread]


def _print_rows(title: str, rows: Mapping[str, str], width: int = 0) -> None:
    """Prints a title and below it {first column: second column}, wrapped to the terminal.

    The first column has `width` characters; 0 gives it the length of its longest text.
    """
    width = width or max(map(len, rows))
    print(f"\n{title}:")
    for name, text in rows.items():
        first = f"  {name:<{width}}  "
        columns = max(len(first) + 20, shutil.get_terminal_size().columns)
        print(
            textwrap.fill(text, columns, initial_indent=first, subsequent_indent=" " * len(first))
        )


def _print_by_tyro(kind: type, command: str, text: str) -> None:
    import tyro

    with suppress(SystemExit):
        tyro.cli(
            kind,
            args=["--help"],
            prog=program(command),
            description=_filled(text),
            use_underscores=True,
        )


def _filled(text: str) -> str:
    """Returns `text` with its paragraphs wrapped to the width of the terminal.

    Each line of a paragraph but the first is indented, since tyro would join lines that begin with
    a letter.
    """
    width = shutil.get_terminal_size().columns
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    return "\n\n".join(textwrap.fill(part, width, subsequent_indent="  ") for part in paragraphs)
