"""Parser of the command line, which fills a command's dataclass and the fields of a recipe.

A frozen dataclass declares the arguments of a command. Each field is a flag, or a positional
argument if it is marked `Positional`. Fields of a nested dataclass are flags with dots. A field of
the type `dict[str, Section]` takes entries whose names the user chooses
(`--teachers.NAME.model VALUE`). A command with a recipe also takes the fields of `recipes/run.py`
as flags.

tyro converts the values, and prints the help from the fields' types and comments. This file
reports all mistakes at once, each in a sentence with the nearest known names. If a flag is
repeated, its last value counts; for a flag such as `--teachers.NAME.model` a warning is logged. A
value may begin with a dash, and a switch may be given as `--switch False`.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from inspect import getdoc
from typing import Any, Generic, TypeVar, cast, get_type_hints

from tyro.conf import Positional

from fd_large import doors, files
from fd_large.cli import help
from fd_large.engine.zero.config import load
from fd_large.errors import ConfigError, nearest
from fd_large.ranks.launch import find_rank
from fd_large.recipes import registry
from fd_large.recipes.fields import (
    describe_type,
    field_names,
    from_plain,
    nested,
    require,
)
from fd_large.recipes.left import refusal
from fd_large.recipes.run import Run, Task
from fd_large.recipes.run_file import accepted, named_fields, read_run_file, run_of
from fd_large.tasks.registry import TASKS, kind_of

log = logging.getLogger(__name__)

HELP = frozenset({"-h", "--help"})
# The deepspeed launcher passes this flag to every program that it starts.
IGNORED = "local_rank"

# The flag whose JSON is read along with the flags, so that all mistakes are reported at once.
DEEPSPEED_CONFIG = "deepspeed_config"

Own = TypeVar("Own")


class HelpShown(Exception):
    """Raised after the requested help was printed, to end the command."""


@dataclass(frozen=True, kw_only=True)
class AllowsCode:
    """Argument --allow-code, for commands that build the models of stored runs and exports."""

    # Python files whose code may be imported if a recipe, a stored run or an export names it, as
    # module:FILE.py:NAME. Files whose import you never allowed are refused.
    allow_code: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for path in self.allow_code:
            require(
                doors.is_own(path)
                or files.kind_of(os.path.expanduser(path), where="--allow_code") == "file",
                "--allow_code: no such file",
                path,
                "a Python file",
            )
            doors.allow(path)


@dataclass(frozen=True, kw_only=True)
class TakesRunFile:
    """Argument --config, for commands that can read a recipe from a file."""

    # YAML or JSON file with values of the recipe's fields, nested as in the recipe.json of a run; a
    # recipe.json itself is accepted too. Flags override the values of the file (docs/recipes.md).
    config: str = ""


@dataclass(frozen=True)
class WithRecipe(Generic[Own]):
    """Parsed arguments of a command that takes the fields of a recipe.

    Attributes:
        own: The command's own arguments.
        run: The recipe with the given fields.
        fields: The recipe's fields given as flags, {"optim.base_lr": 1e-4, ...}.
        in_file: Names of the recipe's fields that the file of --config sets.
    """

    own: Own
    run: Run
    fields: dict[str, Any]
    in_file: Collection[str] = ()


def parse(kind: type[Own], arguments: Sequence[str], *, command: str) -> Own:
    """Parses the arguments of a command without a recipe.

    Args:
        kind: The dataclass of the arguments, with keyword-only fields.
        arguments: Arguments after the command.
        command: Name of the command, for messages and the help.

    Raises:
        ConfigError: With a line for each unknown, missing or invalid argument.
        HelpShown: If the help was requested.
    """
    return _Parser(kind, command).parse(arguments).own


def parse_with_recipe(
    kind: type[Own],
    arguments: Sequence[str],
    *,
    command: str,
    recipe: str,
    often: Mapping[str, str] | None = None,
    base_of: Callable[[Mapping[str, Any]], Run | None] = lambda options: None,
) -> WithRecipe[Own]:
    """Parses the arguments of a command with a recipe and its fields; raises as `parse`.

    Args:
        kind: The dataclass of the command's own arguments; one field is `recipe: str`.
        arguments: As in `parse`.
        command: As in `parse`.
        recipe: Name of the default recipe.
        often: {flag: description} of the flags that the overview of the help shows; None to show
            all of the command's own flags instead of an overview.
        base_of: Function that takes the command's own given arguments, and returns a recipe to use
            instead of the one that --recipe names, or None for the one that --recipe names.
    """
    return _Parser(kind, command, recipe, often, base_of).parse(arguments)


def choose(
    arguments: Sequence[str], commands: Mapping[str, str], *, command: str = "", note: str = ""
) -> tuple[str, list[str]]:
    """Returns the command named by the first argument, and the arguments after it.

    Args:
        arguments: Arguments, beginning with the command's name.
        commands: {name of a command: its summary for the help}.
        command: The command whose subcommands these are, or "".
        note: Last line of the help.

    Raises:
        ConfigError: If the command does not exist.
        HelpShown: If the help was requested, or there are no arguments.
    """
    name, *rest = arguments or ["--help"]
    if name in HELP:
        width = max(map(len, commands))
        lines = [f"  {known:<{width}}  {summary}" for known, summary in commands.items()]
        print(f"usage: {help.program(command)} COMMAND [--help] [ARGUMENTS]\n\ncommands:")
        print("\n".join(lines), *([f"\n{note}"] if note else []), sep="\n")
        raise HelpShown
    if name not in commands:
        where = f"{command} {name}".strip()
        raise ConfigError(
            f"{where}: unknown command; {nearest(name, commands)}. Correct the name, or see "
            f"{help.program(command)} --help."
        )
    return name, rest


def call_subcommand(
    arguments: Sequence[str],
    commands: Mapping[str, tuple[type, Callable[..., int]]],
    *,
    command: str,
) -> int:
    """Calls one of several subcommands with its arguments as keywords; returns the exit code.

    Args:
        arguments: Arguments after `command`: a subcommand and its own arguments.
        commands: {subcommand: (the dataclass of its arguments, its function)}.
        command: The command whose subcommands these are.

    Raises: ConfigError or HelpShown: as `choose` and `parse`.
    """
    summaries = {name: (getdoc(kind) or "").split("\n")[0] for name, (kind, _) in commands.items()}
    name, rest = choose(arguments, summaries, command=command)
    kind, call = commands[name]
    options = vars(parse(kind, rest, command=f"{command} {name}"))
    return call(**{key: value for key, value in options.items() if key != "allow_code"})


# ------------------------------------------------------------------------------------------------


class _Parser(Generic[Own]):
    """Parser of a command; an instance parses once."""

    def __init__(
        self,
        kind: type[Own],
        command: str,
        recipe: str | None = None,
        often: Mapping[str, str] | None = None,
        base_of: Callable[[Mapping[str, Any]], Run | None] = lambda options: None,
    ) -> None:
        self._base_of, self._often = base_of, often
        self._kind, self._command, self._recipe = kind, command, recipe
        self._positional = {}
        for name, hint in get_type_hints(kind, include_extras=True).items():
            marks = getattr(hint, "__metadata__", ())
            if Positional in marks:
                metavars = [mark.metavar for mark in marks if hasattr(mark, "metavar")]
                self._positional[name] = next(iter(metavars), name.upper())
        self._usage = " ".join(self._positional.values())
        self._mistakes: list[str] = []
        # Flags with invalid values, and known flags that an unknown flag may have meant.
        self._invalid: set[str] = set()
        self._task: type[Task] = Task
        # Names of the fields that the file of --config sets.
        self._in_file: Collection[str] = ()

    def parse(self, arguments: Sequence[str]) -> WithRecipe[Own]:
        self._check_code(arguments)
        from_file = self._run_file(arguments) if self._recipe is not None else None
        own_task = _own_task(arguments) if self._recipe is not None else ""
        if from_file is not None:
            self._task = type(from_file.task)
        if own_task:  # The fields of the task's own section are flags too.
            self._task = Task.class_for({"name": own_task})
        arguments, help_section = self._without_help(arguments)
        values = self._values(arguments)
        # The first part of a name does not decide: `evaluate` has a --task of its own.
        is_own = {name: name in field_names(self._kind, like=name) for name in values}
        options = {name: value for name, value in values.items() if is_own[name]}
        recipe_fields = {name: value for name, value in values.items() if not is_own[name]}
        base = run = built = None
        if self._recipe is not None:
            try:
                base = from_file or self._base_of(options)
                where = self._command if "recipe" in self._positional else "--recipe"
                base = base or registry.get(options.get("recipe") or self._recipe, where=where)
                base = base.with_fields({"task.name": own_task}) if own_task else base
            except ConfigError as error:
                if help_section is not None:
                    raise
                self._mistakes.append(str(error))
        if help_section is not None:
            self._print_help(base, help_section)
            raise HelpShown
        if base is not None:
            build = partial(base.with_fields, stay=self._in_file)
            run = accepted(recipe_fields, build, self._mistakes, refused=self._invalid)
        if config := options.get(DEEPSPEED_CONFIG):
            try:
                load(config)
            except ConfigError as error:
                self._mistakes.append(str(error))
        if missing := [name for name in help.required(self._kind) if name not in options]:
            self._mistakes += [self._missing(name) for name in missing if name not in self._invalid]
        else:
            built = accepted(
                options,
                lambda values: from_plain(self._kind, nested(values), "--"),
                self._mistakes,
                refused=self._invalid,
            )
        if self._mistakes:
            raise ConfigError("\n".join(dict.fromkeys(self._mistakes)))
        # The run is None only for commands without a recipe, which do not read it.
        return WithRecipe(cast(Own, built), cast(Run, run), recipe_fields, self._in_file)

    def _check_code(self, arguments: Sequence[str]) -> None:
        """Refuses `module:` names in `arguments` whose file is missing or does not define the name.

        The method imports nothing, so that a mistyped name is reported before imports that take
        seconds.

        Raises: ConfigError: with a line for each refused name.
        """
        wrong = [
            complaint
            for name, texts, _ in _groups(arguments)
            for text in texts
            if name and (complaint := doors.complaint(text, f"--{name}"))
        ]
        if wrong:
            raise ConfigError("\n".join(wrong))

    def _values(self, arguments: Sequence[str]) -> dict[str, Any]:
        """Returns {name: value} of the own arguments and recipe fields that `arguments` mention.

        Messages about mistakes are added to `self._mistakes`, and the names of flags with invalid
        values to `self._invalid`.
        """
        flags: dict[str, tuple[Any, list[str], bool]] = {}
        loose: list[str] = []
        meant: set[str] = set()
        for typed, texts, joined in _groups(arguments):
            known = self._known(typed)
            name = typed.replace("-", "_")
            section, dot, switch = name.rpartition(".")
            if off := name not in known and switch.startswith("no_"):
                name = f"{section}{dot}{switch.removeprefix('no_')}"
            if not typed:
                loose += texts
            elif name in known and not (off and known[name][1] is not bool):
                # Texts beyond a flag's value are positional arguments, if the command has any.
                name, hint = known[name]
                count = len(texts)
                if self._positional:
                    count = max(joined, 0 if off else _count(hint, texts))
                flag = hint, texts[:count], off
                if flags.get(name, flag) != flag:
                    self._say_twice(name, flag[1])
                flags[name] = flag
                loose += texts[count:]
            elif name != IGNORED:
                section = help.section_named(typed, self._task) if self._recipe else ""
                help_command = f"{help.program(self._command)} --help {section}".rstrip()
                message = refusal(name, " ".join(texts)) or (
                    f"{typed}: unknown flag; {self._nearest(typed)}. Correct the name, or see "
                    f"{help_command}."
                )
                self._mistakes.append(f"--{message}")
                meant |= set(get_close_matches(typed, known, n=1))
                if texts:  # One of them may be a positional argument.
                    self._invalid.update(self._positional)
        self._invalid |= meant - flags.keys()
        values: dict[str, Any] = {}
        for name, (hint, texts, off) in flags.items():
            try:
                values[name] = _value(hint, texts, off=off)
            except ValueError:
                self._invalid.add(name)
                self._mistakes.append(
                    f"--{name}: a value of the wrong type; got {' '.join(texts) or 'nothing'},"
                    f" expected {describe_type(hint)}. Change the value."
                )
        for name, usage in self._positional.items():
            if name not in values and loose:
                several = "..." in usage
                taken, loose = (loose, []) if several else (loose[:1], loose[1:])
                values[name] = tuple(taken) if several else taken[0]
            # Path("") is the current folder.
            if values.get(name) == "" or (
                isinstance(values.get(name), tuple) and "" in values[name]
            ):
                del values[name]
                self._invalid.add(name)
                self._mistakes.append(
                    f"{self._command}: {usage}: empty; got '', expected a name. Give the name."
                )
        if loose:
            self._mistakes.append(
                f"{self._command}: unexpected argument; got {' '.join(loose)!r}, expected "
                f"{self._usage or 'flags alone, --NAME VALUE'}. Leave the argument out, or write "
                "its flag before it."
            )
        return values

    def _known(self, like: str) -> dict[str, tuple[str, Any]]:
        """Returns {name with underscores: (name, type)} of all flags of the command.

        Flags of a dict whose keys the user chooses are returned for the key in `like`, a flag as
        the user typed it: "big" for `teachers.big.model`.
        """
        names: dict[str, Any] = {}
        if self._recipe is not None:
            names = field_names(Run, like=like) | field_names(self._task, "task.", like=like)
            names.pop("name")
        names |= field_names(self._kind, like=like)
        return {name.replace("-", "_"): (name, hint) for name, hint in names.items()}

    def _say_twice(self, name: str, texts: list[str]) -> None:
        """Warns that a flag such as `--teachers.NAME.model` is repeated, and which value is used.

        The user may have meant two entries with different names. There is no warning for a flag
        that does not have the name of an entry. The later value, which is used, has the `texts`.
        """
        if name not in self._known("") and find_rank() == 0:
            entry = name.split(".")[1]
            log.warning(
                "--%s: given twice, and the later value is used: %s. If you mean two entries, "
                "give the second a name other than %r.",
                name,
                " ".join(texts),
                entry,
            )

    def _nearest(self, typed: str) -> str:
        names = (name for name, _ in self._known(typed).values())
        known = [name for name in names if name not in self._positional]
        if not known:
            return f"expected {self._usage or 'no arguments'} and no flags"
        # Fields that were named without their section, those of named entries last.
        whole = sorted(
            (name for name in known if name.split(".")[-1] == typed), key=lambda n: n.count(".")
        )
        # Close names are shown alone; only if there are none, less similar names are.
        close = whole[:3] or get_close_matches(typed, known, n=2, cutoff=0.85)
        if close:
            return f"nearest: {', '.join(f'--{name}' for name in close)}"
        return nearest(typed, known, before="--")

    def _run_file(self, arguments: Sequence[str]) -> Run | None:
        """Returns the recipe in the file that --config names, or None without a valid file.

        Mistakes in the file are added to the list of mistakes. The file is read before the flags,
        because its task decides which flags exist.
        """
        if "config" not in field_names(self._kind):
            return None
        # Mistakes found here are dropped: the parser that knows the task finds them too.
        values = _Parser(self._kind, self._command, self._recipe)._values(arguments)
        if "config" not in values:
            return None
        for path in values.get("allow_code", ()):
            doors.allow(path)
        recipe = values.get("recipe", "")
        try:
            file = read_run_file(values["config"])
            self._in_file = named_fields(file, [])
            return run_of(
                file,
                recipe=recipe or str(self._recipe),
                named=bool(recipe),
                mistakes=self._mistakes,
                refused=self._invalid,
            )
        except ConfigError as error:
            self._mistakes.append(str(error))
            return None

    def _missing(self, name: str) -> str:
        see = f"See {help.program(self._command)} --help."
        if name in self._positional:
            metavar = self._positional[name]
            return f"{self._command}: {metavar} is missing; expected {self._usage}. {see}"
        expected = describe_type(field_names(self._kind)[name])
        if name == DEEPSPEED_CONFIG:
            expected = "DeepSpeed's JSON, by name or path, such as --deepspeed_config zero3"
        return f"--{name}: not given; expected {expected}. {see}"

    def _without_help(self, arguments: Sequence[str]) -> tuple[list[str], str | None]:
        """Removes --help, and the name of a section after it, from `arguments`.

        Returns: the other arguments; and the section, which is "" for --help alone, and None
            without --help.

        Raises: ConfigError: if the section does not exist.
        """
        first = next((n for n, argument in enumerate(arguments) if argument in HELP), None)
        if first is None:
            return list(arguments), None
        others = [argument for argument in arguments if argument not in HELP]
        typed = others[first] if first < len(others) else "--"
        if self._recipe is None or typed.startswith("--"):
            return others, ""
        if section := help.section_named(typed, self._task):
            del others[first]
        elif not self._positional:
            known = [*help.sections_of(self._task), help.ALL]
            raise ConfigError(
                f"--help: no such section of a recipe; got {typed!r}, {nearest(typed, known)}. "
                "Correct the name, or give --help alone."
            )
        return others, section

    def _print_help(self, base: Run | None, section: str) -> None:
        if base is None or (not section and self._often is None):
            help.print_own(self._kind, self._command, of_recipe=base is not None)
        elif section:
            help.print_sections(self._kind, self._command, base, self._task, section)
        else:
            assert self._often is not None
            help.print_overview(self._kind, self._command, base, self._task, self._often)


def _groups(arguments: Sequence[str]) -> Iterator[tuple[str, list[str], bool]]:
    """Yields each flag with the texts after it, as ("optim.betas", ["0.9", "0.95"], False).

    The first item of a tuple is the flag's name, or "" for the texts before the first flag. The
    third item is True if the first text was joined to the flag by an equals sign.
    """
    name, joined = "", False
    texts: list[str] = []
    for argument in arguments:
        if argument.startswith("--"):
            yield name, texts, joined
            name, equals, value = argument[2:].partition("=")
            texts, joined = [value] if equals else [], bool(equals)
        else:
            texts.append(argument)
    yield name, texts, joined


def _count(hint: Any, texts: list[str]) -> int:
    """Returns how many of `texts`, which follow a flag, are the flag's value.

    This is the largest number of first texts that form a value of the type `hint`. If no number
    does, the result is 0 for a bool, and otherwise at most 1.
    """
    for count in range(len(texts), 0, -1):
        with suppress(ValueError):
            _value(hint, texts[:count])
            return count
    return 0 if hint is bool else min(1, len(texts))


def _value(hint: Any, texts: list[str], *, off: bool = False) -> Any:
    """Returns the value of the type `hint` that the texts after a flag form.

    A switch that was given as --no_NAME is `off`.

    Raises: ValueError: if the texts are not a value of this type.
    """
    from tyro.constructors import (
        ConstructorRegistry,
        PrimitiveConstructorSpec,
        PrimitiveTypeInfo,
    )

    if hint is bool and not texts:
        return not off
    spec = ConstructorRegistry.get_primitive_spec(PrimitiveTypeInfo.make(hint, set()))
    assert isinstance(spec, PrimitiveConstructorSpec)  # Fields are of types that tyro knows.
    if off or not (spec.nargs == "*" or spec.nargs == len(texts)):
        raise ValueError
    if hint is bool and texts[0] not in ("True", "False"):
        raise ValueError  # tyro takes all but "True" for False.
    return spec.instance_from_str(texts)


def _own_task(arguments: Sequence[str]) -> str:
    """Returns the user's own task in the last --task.name of `arguments`, or "" if there is none.

    Its path is made absolute.

    Raises: ConfigError: if the task cannot be imported.
    """
    named = [texts[0] for name, texts, _ in _groups(arguments) if name == "task.name" and texts]
    if not named or named[-1] in TASKS:
        return ""
    try:
        kind_of(named[-1])
    except ConfigError:
        if doors.is_own(named[-1]):
            raise
        return ""  # A mistyped name, which is refused with the other mistakes.
    return doors.absolute(named[-1])
