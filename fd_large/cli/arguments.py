"""The one parser of the command line: arguments to a dataclass, and to fields of a recipe.

A command's arguments are a frozen dataclass. Its fields are flags; those marked `Positional` are
arguments without a name; nested dataclasses are flags with dots; a field `dict[str, Section]` takes
entries whose names stand on the command line alone (`--teachers.NAME.model VALUE`). A command that
takes a recipe takes the fields of `recipes/run.py` beside its own.

tyro converts the values and prints the help, from types and comments of the fields. What it cannot
do is here: each mistake in one sentence with the nearest names, and all of them at once; later
flags win; values may begin with a dash; `--switch False`.
"""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import MISSING, dataclass, field, fields, is_dataclass, make_dataclass
from difflib import get_close_matches
from inspect import getdoc
from typing import Annotated, Any, Generic, NamedTuple, TypeVar, get_type_hints

from tyro.conf import Positional

from fd_large.errors import ConfigError, nearest
from fd_large.recipes import registry
from fd_large.recipes.fields import (
    describe_type,
    entry_type,
    field_names,
    from_plain,
    hints_of,
    nested,
    override,
)
from fd_large.recipes.run import Run

HELP = frozenset({"-h", "--help"})
# The deepspeed launcher passes it to whatever it starts.
IGNORED = "local_rank"

Own = TypeVar("Own")


class HelpShown(Exception):
    """The help was asked for and is printed; there is nothing else to do."""


@dataclass(frozen=True)
class WithRecipe(Generic[Own]):
    """What a command was given that takes the fields of a recipe.

    Attributes:
        own: The command's own arguments.
        run: The recipe with the given fields.
        fields: The given fields alone, {"optim.base_lr": 1e-4, ...}.
    """

    own: Own
    run: Run
    fields: dict[str, Any]


def parse(kind: type[Own], arguments: Sequence[str], *, command: str) -> Own:
    """Reads the arguments of a command that takes no recipe.

    Args:
        kind: The dataclass of the arguments, with keywords only.
        arguments: What follows the command.
        command: Its name, for messages and the help.

    Raises:
        ConfigError: Something is unknown, missing or invalid; a line for each mistake.
        HelpShown: The help was asked for.
    """
    return _Parser(kind, command).parse(arguments).own


def parse_with_recipe(
    kind: type[Own], arguments: Sequence[str], *, command: str, recipe: str, in_help: bool = False
) -> WithRecipe[Own]:
    """Reads the arguments of a command that takes a recipe and its fields as well.

    Args:
        kind: The dataclass of the command's own arguments; one of them is `recipe: str`.
        arguments: What follows the command.
        command: Its name, for messages and the help.
        recipe: Name of the recipe where none is given.
        in_help: Whether the help lists the fields of the recipe with their values.

    Raises: As `parse`.
    """
    return _Parser(kind, command, recipe, in_help).parse(arguments)


def choose(
    arguments: Sequence[str], commands: Mapping[str, str], *, command: str = ""
) -> tuple[str, list[str]]:
    """Returns the command that the first argument names, and the arguments after it.

    Args:
        arguments: What was given.
        commands: Name to summary, for the help.
        command: What precedes the name, if anything.

    Raises:
        ConfigError: There is no such command.
        HelpShown: The help was asked for, or nothing was given.
    """
    name, *rest = arguments or ["--help"]
    if name in HELP:
        width = max(map(len, commands))
        lines = [f"  {known:<{width}}  {summary}" for known, summary in commands.items()]
        print(f"usage: {_program(command)} COMMAND [--help] [ARGUMENTS]\n\ncommands:")
        print("\n".join(lines))
        raise HelpShown
    if name not in commands:
        where = f"{command} {name}".strip()
        raise ConfigError(f"{where}: unknown command; {nearest(name, commands)}")
    return name, rest


def call_subcommand(
    arguments: Sequence[str],
    commands: Mapping[str, tuple[type, Callable[..., int]]],
    *,
    command: str,
) -> int:
    """Calls one of several commands with its arguments as keywords; returns the exit code.

    Args:
        arguments: What follows `command`: one of the commands and its own arguments.
        commands: Name to the dataclass of the arguments and what is called.
        command: What precedes the name.

    Raises: As `choose` and `parse`.
    """
    summaries = {name: (getdoc(kind) or "").split("\n")[0] for name, (kind, _) in commands.items()}
    name, rest = choose(arguments, summaries, command=command)
    kind, call = commands[name]
    return call(**vars(parse(kind, rest, command=f"{command} {name}")))


# ------------------------------------------------------------------------------------------------


class _Flag(NamedTuple):
    """A flag that exists.

    Attributes:
        kind: The dataclass that it belongs to.
        name: Its name, with dots and underscores.
        type: The type of its value.
        off: Whether it was given as --no_NAME, the opposite of a switch.
    """

    kind: type
    name: str
    type: Any
    off: bool = False


class _Parser(Generic[Own]):
    """One command's parser; it is used once."""

    def __init__(
        self, kind: type[Own], command: str, recipe: str | None = None, in_help: bool = False
    ) -> None:
        self._kind, self._command, self._recipe, self._in_help = kind, command, recipe, in_help
        self._positional = {}
        for name, hint in get_type_hints(kind, include_extras=True).items():
            marks = getattr(hint, "__metadata__", ())
            if Positional in marks:
                metavars = [mark.metavar for mark in marks if hasattr(mark, "metavar")]
                self._positional[name] = next(iter(metavars), name.upper())
        self._mistakes: list[str] = []
        self._invalid: set[str] = set()

    def parse(self, arguments: Sequence[str]) -> WithRecipe[Own]:
        values = self._values([argument for argument in arguments if argument not in HELP])
        own, given = values[self._kind], values[Run]
        base = run = None
        if self._recipe is not None:
            try:
                base = registry.get(own.get("recipe") or self._recipe)
            except ConfigError as error:
                self._mistakes.append(str(error))
        if not HELP.isdisjoint(arguments):
            self._print_help(base)
            raise HelpShown
        if base is not None:
            run = self._accepted(given, lambda values: override(base, values))
        missing = [name for name in _required(self._kind) if name not in own]
        for name in missing:
            if name not in self._invalid:
                self._mistakes.append(self._missing(name))
        built = None
        if not missing:
            built = self._accepted(own, lambda values: from_plain(self._kind, nested(values), ""))
        if self._mistakes:
            raise ConfigError("\n".join(dict.fromkeys(self._mistakes)))
        return WithRecipe(built, run, given)

    def _values(self, arguments: Sequence[str]) -> dict[type, dict[str, Any]]:
        """Values by name, of the command's own arguments and of the recipe's fields."""
        values: dict[type, dict[str, Any]] = {self._kind: {}, Run: {}}
        loose: list[str] = []
        flags: dict[tuple[type, str], tuple[_Flag, list[str]]] = {}
        for typed, texts, joined in _groups(arguments):
            if not typed:
                loose += texts
            elif flag := self._flag(typed):
                # A value more than a flag takes is a positional argument, where there are such.
                count = max(joined, _count(flag, texts)) if self._positional else len(texts)
                flags[flag.kind, flag.name] = flag, texts[:count]
                loose += texts[count:]
            elif typed.replace("-", "_") != IGNORED:
                self._mistakes.append(f"--{typed}: unknown flag; {self._nearest(typed)}")
                if texts:  # One of them may be a positional argument.
                    self._invalid.update(self._positional)
        for flag, texts in flags.values():
            try:
                values[flag.kind][flag.name] = _value(flag, texts)
            except ValueError:
                self._invalid.add(flag.name)
                self._mistakes.append(
                    f"--{flag.name}: a value of the wrong type; got {' '.join(texts) or 'nothing'},"
                    f" expected {describe_type(flag.type)}. Change the value."
                )
        for name, usage in self._positional.items():
            count = len(loose) if "..." in usage else 1
            if taken := loose[:count]:
                values[self._kind][name] = tuple(taken) if "..." in usage else taken[0]
            loose = loose[count:]
        if loose:
            usage = " ".join(self._positional.values()) or "flags alone, --NAME VALUE"
            self._mistakes.append(
                f"{self._command}: unexpected argument; got {' '.join(loose)!r}, expected {usage}. "
                "Leave it out, or name the flag before it."
            )
        return values

    def _known(self, like: str) -> dict[str, _Flag]:
        """All flags by name; an entry of a dict has the name that it has in `like`."""
        known = {}
        if self._recipe is not None:
            names = field_names(Run, like=like).items()
            known = {name: _Flag(Run, name, hint) for name, hint in names if name != "name"}
        for name, hint in field_names(self._kind, like=like).items():
            if name not in self._positional:
                known[name] = _Flag(self._kind, name, hint)
        return known

    def _flag(self, typed: str) -> _Flag | None:
        known = {name.replace("-", "_"): flag for name, flag in self._known(typed).items()}
        name = typed.replace("-", "_")
        if name in known:
            return known[name]
        section, dot, switch = name.rpartition(".")
        flag = known.get(f"{section}{dot}{switch.removeprefix('no_')}")
        return flag._replace(off=True) if flag is not None and flag.type is bool else None

    def _nearest(self, typed: str) -> str:
        known = self._known(typed)
        if "." not in typed:  # A field without its section.
            whole = [name for name in known if name.split(".")[-1] == typed]
            if whole:
                return f"nearest: {', '.join(whole[:3])}"
        # A near miss stands alone; names that are further off come by the wider search.
        close = get_close_matches(typed, known, n=2, cutoff=0.85)
        return f"nearest: {', '.join(close)}" if close else nearest(typed, known)

    def _accepted(
        self, values: dict[str, Any], build: Callable[[dict[str, Any]], Any]
    ) -> Any | None:
        """What is built of values; each one that is refused is noted and left out."""
        values = dict(values)
        while True:
            try:
                return build(values)
            except ConfigError as error:
                self._mistakes.append(str(error))
                # Messages begin with the field.
                name = str(error).partition(":")[0].lstrip("-")
                if name not in values:
                    return None
                del values[name]

    def _missing(self, name: str) -> str:
        if name in self._positional:
            usage = " ".join(self._positional.values())
            return (
                f"{self._command}: {self._positional[name]} is missing; expected {usage}. See "
                f"{_program(self._command)} --help."
            )
        expected = describe_type(field_names(self._kind)[name])
        return f"--{name}: not given; got nothing, expected {expected}. Set it."

    def _print_help(self, base: Run | None) -> None:
        import tyro

        shown: type = self._kind
        if base is not None and self._in_help:
            missing = dict.fromkeys(_required(self._kind), tyro.MISSING)
            own = self._kind(recipe=base.name, **missing)
            # The command's own flags without a prefix, then the sections.
            parts = [("own", Annotated[self._kind, tyro.conf.arg(name="")], field(default=own))]
            parts += [
                (name, _with_name(hint), field(default=getattr(base, name)))
                for name, hint in hints_of(Run).items()
                if name != "name"
            ]
            shown = make_dataclass("Shown", parts, frozen=True)
        with suppress(SystemExit):
            tyro.cli(
                shown,
                args=["--help"],
                prog=_program(self._command),
                description=_wrapped(getdoc(self._kind) or ""),
                use_underscores=True,
            )


def _program(command: str) -> str:
    return f"python -m fd_large {command}".strip()


def _groups(arguments: Sequence[str]) -> Iterator[tuple[str, list[str], bool]]:
    """Splits arguments at the flags: ("optim.betas", ["0.9", "0.95"], False).

    The name is "" before the first flag; the last of the three says whether the first value is
    joined to the flag by an equals sign.
    """
    name, texts, joined = "", [], False
    for argument in arguments:
        if argument.startswith("--"):
            yield name, texts, joined
            name, equals, value = argument[2:].partition("=")
            texts, joined = [value] if equals else [], bool(equals)
        else:
            texts.append(argument)
    yield name, texts, joined


def _count(flag: _Flag, texts: list[str]) -> int:
    """How many of the texts after a flag are its value."""
    if flag.off or flag.type is bool:
        return int(not flag.off and texts[:1] in (["True"], ["False"]))
    size = _spec(flag.type).nargs
    if size != "*":
        return min(int(size), len(texts))
    for count in range(len(texts), 0, -1):
        try:
            _value(flag, texts[:count])
            return count
        except ValueError:
            continue
    return min(1, len(texts))


def _value(flag: _Flag, texts: list[str]) -> Any:
    """The value of a flag.

    Raises: ValueError: if the texts are not of its type.
    """
    if flag.type is bool and not texts:
        return not flag.off
    spec = _spec(flag.type)
    if flag.off or spec.nargs not in ("*", len(texts)):
        raise ValueError
    if flag.type is bool and texts[0] not in ("True", "False"):
        raise ValueError  # tyro takes all but "True" for False.
    return spec.instance_from_str(texts)


def _spec(hint: Any) -> Any:
    """tyro's knowledge of a type."""
    from tyro.constructors import ConstructorRegistry, PrimitiveTypeInfo

    return ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(hint, set()))


def _required(kind: type, prefix: str = "") -> Iterator[str]:
    """Names of the fields without a default, nested ones included."""
    for own in fields(kind):
        hint = hints_of(kind)[own.name]
        if own.default is not MISSING or own.default_factory is not MISSING:
            continue
        if is_dataclass(hint):
            yield from _required(hint, f"{prefix}{own.name}.")
        else:
            yield prefix + own.name


def _with_name(hint: Any) -> Any:
    """A type for the help: of dict[str, Section] an entry that is called NAME."""
    section = entry_type(hint)
    return make_dataclass("Entries", [("NAME", section)]) if section else hint


def _wrapped(text: str) -> str:
    """Paragraphs in the width of the terminal; tyro joins lines that begin with a letter."""
    width = shutil.get_terminal_size().columns
    paragraphs = (" ".join(part.split()) for part in text.split("\n\n"))
    return "\n\n".join(textwrap.fill(part, width, subsequent_indent="  ") for part in paragraphs)
