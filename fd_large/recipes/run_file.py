"""Reads values of a recipe's fields from a YAML or JSON file, or from Python.

The values are nested as in `recipe.json`, or have names with dots ("optim.max_steps: 20"). Nothing
in a file is evaluated, and the user's own code that a file names is imported only if the command
line allows it.
"""

from __future__ import annotations

import os.path
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar

import yaml

from fd_large.errors import ConfigError, ConflictError, first_line, nearest
from fd_large.files import parse_json, read_bytes
from fd_large.recipes import registry
from fd_large.recipes.fields import field_names
from fd_large.recipes.left import LEFT, refusal
from fd_large.recipes.run import Run, Task

T = TypeVar("T")

NAME = "name"
WHERE = "--config"
# A recipe has some hundred; a few lines of YAML can stand for millions, by aliases of aliases.
MOST_NAMES, MOST_BYTES = 10_000, 4 << 20


@dataclass(frozen=True)
class Given:
    """Values of a recipe's fields that the user gave, with their lines in a file.

    Attributes:
        values: The values, nested or by full names such as "optim.max_steps".
        path: The file; "" for values from Python.
        lines: Line number of each name in the file, if known.
    """

    values: Mapping[str, Any]
    path: str = ""
    lines: Mapping[str, int] = field(default_factory=dict)

    def where(self, name: str) -> str:
        """Returns "FILE:LINE: " of the field `name`, with which a message begins.

        It is "FILE: " if the line is unknown, and "" for values from Python.
        """
        if not self.path:
            return ""
        inside = (line for key, line in self.lines.items() if key.startswith(f"{name}."))
        line = self.lines.get(name) or next(inside, None)
        return f"{self.path}:{line}: " if line else f"{self.path}: "


class _Loader(yaml.SafeLoader):
    """YAML loader with the scalars of YAML 1.2, where `off` and `no` are text and 1e-4 a number."""


_Loader.yaml_implicit_resolvers = {}
for _tag, _pattern, _first in (
    ("null", r"~|null|Null|NULL|", [*"~nN", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(0|[1-9][0-9]*)", list("-+0123456789")),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", list("-+.0123456789")),
):
    _whole = re.compile(f"^(?:{_pattern})$")
    _Loader.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", _whole, _first)


def read_run_file(path: str) -> Given:
    """Reads a YAML or JSON file with fields of a recipe.

    Raises: ConfigError: if the file is missing, is neither YAML nor JSON, or sets a name twice.
    """
    remedy = "Name a YAML or JSON file with fields of a recipe, such as the recipe.json of a run."
    data = read_bytes(os.path.expanduser(path), where=WHERE, remedy=remedy, max_bytes=MOST_BYTES)
    try:
        text = data.decode()
    except UnicodeDecodeError as error:
        raise ConfigError(
            f"{WHERE}: {path}: cannot be read; got {error}, expected UTF-8. {remedy}"
        ) from None
    lines: dict[str, int] = {}
    twice: list[str] = []
    try:
        with suppress(ValueError):
            tree: Any = parse_json(text)
            with suppress(yaml.YAMLError):  # YAML refuses some JSON; lines are then not known.
                _note_lines(yaml.compose(text, Loader=_Loader), "", lines, twice)
            return _given(tree, path, lines, twice)
        _note_lines(yaml.compose(text, Loader=_Loader), "", lines, twice)
        tree = yaml.load(text, Loader=_Loader)
    except (yaml.YAMLError, RecursionError, ValueError) as error:  # A number or date may raise.
        mark = getattr(error, "problem_mark", None)
        place = f":{mark.line + 1}" if mark else ""
        reason = first_line(error) if isinstance(error, ValueError) else type(error).__name__
        problem = getattr(error, "problem", None) or reason
        raise ConfigError(
            f"{path}{place}: neither YAML nor JSON; got {problem}, expected names with values, "
            "for example optim: {max_steps: 20}. Correct the file."
        ) from None
    return _given(tree, path, lines, twice)


def _given(tree: Any, path: str, lines: dict[str, int], twice: list[str]) -> Given:
    if not isinstance(tree, dict):
        raise ConfigError(
            f"{path}: not fields of a recipe; got {type(tree).__name__}, expected names with "
            "values, for example optim: {max_steps: 20}. Correct the file."
        )
    if twice:
        raise ConfigError("\n".join(f"{path}:{complaint}" for complaint in twice))
    return Given(tree, path, lines)


def _note_lines(node: Any, prefix: str, lines: dict[str, int], twice: list[str]) -> None:
    """Adds the line of each name in a YAML mapping to `lines`, and repeated names to `twice`.

    Nodes other than mappings are ignored. `prefix` is the full name of the mapping with a dot, or
    "".

    Raises: yaml.MarkedYAMLError: if there are more than `MOST_NAMES` names.
    """
    if not isinstance(node, yaml.MappingNode):
        return
    if len(lines) > MOST_NAMES:
        raise yaml.MarkedYAMLError(
            problem=f"more than {MOST_NAMES:,} names", problem_mark=node.start_mark
        )
    names = set()
    for key, value in node.value:
        name, line = f"{prefix}{key.value}", key.start_mark.line + 1
        if name in names:
            twice.append(f"{line}: {name}: given twice; expected once. Remove one of the two.")
        names.add(name)
        lines[name] = line
        _note_lines(value, f"{name}.", lines, twice)


def run_of(
    source: Given,
    *,
    recipe: str,
    named: bool = False,
    mistakes: list[str] | None = None,
    refused: set[str] | None = None,
) -> Run | None:
    """Returns the recipe that given values describe, or None if a mistake prevents making one.

    The values may have an entry `name`. If it is the name of a recipe, the other values change this
    recipe. Otherwise the values describe a new run of this name, and must include `student.model`.

    Args:
        source: The values.
        recipe: Name of the recipe to change if the values have no entry `name`.
        named: Whether the user chose `recipe`; the entry `name` is then ignored.
        mistakes: List to which a line for each mistake is added; None to raise an error instead.
        refused: Set to which the full names of refused values are added; None to drop them.

    Raises: ConfigError: with a line for each mistake, if `mistakes` is None.
    """
    messages: list[str] = []
    name = source.values.get(NAME, recipe)
    base, run = None, None
    values = named_fields(source, messages)
    values.pop(NAME, None)
    try:
        if named or name in registry.RECIPES:
            base = registry.get(recipe if named else name)
        elif not isinstance(name, str) or "student.model" not in values:
            raise ConfigError(
                f"{NAME}: no such recipe, and no student.model for a new run; got {name!r}, "
                f"{nearest(str(name), registry.RECIPES)}. Name a recipe, or add student.model."
            )
        else:
            base = Run.from_dict(
                {NAME: name, "student": {"model": values["student.model"]}, **_task_of(values)}
            )
        refused = set() if refused is None else refused
        run = accepted(values, base.with_fields, messages, where=source.where, refused=refused)
    except ConfigError as error:
        messages.append(f"{source.where(NAME)}{error}")
    if mistakes is not None:
        mistakes += messages
    elif messages:
        raise ConfigError("\n".join(dict.fromkeys(messages)))
    return run


def _task_of(values: Mapping[str, Any]) -> dict[str, Any]:
    return {"task": {NAME: values["task.name"]}} if "task.name" in values else {}


def named_fields(source: Given, mistakes: list[str]) -> dict[str, Any]:
    """Returns given values by full name, {"optim.max_steps": 20, ...}.

    Names that are no field of a recipe are left out, and a line for each is added to `mistakes`,
    except for removed fields without effect.
    """
    task = Task
    task_name = next(
        (value for name, value in _leaves(source.values, {}) if name == "task.name"), None
    )
    with suppress(ConfigError):  # `run_of` reports what is wrong with it.
        task = Task.class_for({NAME: task_name} if task_name else {})
    values: dict[str, Any] = {}
    fixed = field_names(Run) | field_names(task, "task.")
    for name, value in _leaves(source.values, fixed):
        known = fixed if name in fixed else field_names(Run, like=name)
        if name in known or _is_of_own_task(name, task):
            values[name] = value
        elif name not in LEFT or value != LEFT[name].idle:  # A stored recipe has all fields.
            message = refusal(name, value) or (
                f"{name}: no such field; {_nearest(name, fixed)}. Correct the name."
            )
            mistakes.append(f"{source.where(name)}{message}")
    return values


def _is_of_own_task(name: str, task: type[Task]) -> bool:
    """Whether the field `name` is of a task of the user's own whose code may not be imported.

    `task` is the class of the recipe's section `task`.
    """
    section = ".".join(name.split(".")[:2])
    return task is not Task and field_names(task, "task.").get(section) == dict[str, Any]


def _leaves(
    values: Mapping[str, Any], known: Mapping[str, Any], prefix: str = ""
) -> Iterator[tuple[str, Any]]:
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping) and name not in known and value:
            yield from _leaves(value, known, f"{name}.")
        elif not isinstance(value, Mapping) and not (
            # A section of YAML with nothing in it.
            value is None and any(known_name.startswith(f"{name}.") for known_name in known)
        ):
            yield name, value


def _nearest(name: str, known: Mapping[str, Any]) -> str:
    # A field without its section, or in another one.
    last = name.rpartition(".")[2]
    whole = [key for key in known if key.rpartition(".")[2] == last]
    return f"nearest: {', '.join(whole[:3])}" if whole else nearest(name, known)


def accepted(
    values: Mapping[str, Any],
    build: Callable[[dict[str, Any]], T],
    mistakes: list[str],
    *,
    where: Callable[[str], str] = lambda name: "",
    refused: set[str] | None = None,
) -> T | None:
    """Returns the object that `build` makes of values, without the values that it refuses.

    In place of a refused value, the object has the recipe's own value. A mistake that may result
    from this replacement is not reported, since the user did not make it.

    Args:
        values: Values by full name.
        build: Function that makes the object of values, or raises a ConfigError whose message
            begins with the name of a refused value.
        mistakes: List to which the messages are added.
        where: Function from a value's name to the beginning of its message.
        refused: Names of values that were refused before, to which further names are added.

    Returns: the object, or None if a refusal is not due to one of the values.
    """
    accepted_values = dict(values)
    refused = set() if refused is None else refused
    while True:
        try:
            return build(accepted_values)
        except ConfigError as error:
            fields = error.fields if isinstance(error, ConflictError) else _fields_of(error)
            blamed = [name for name in fields if name in accepted_values]
            if not _comes_of(refused, fields, error, user_set=bool(blamed)):
                text = error.told_to(values) if isinstance(error, ConflictError) else str(error)
                mistakes.append(f"{where((blamed or list(fields))[0])}{text}")
            refused |= set(blamed)
            for name in blamed:
                del accepted_values[name]
            if not blamed:
                return None


def _fields_of(error: ConfigError) -> tuple[str, ...]:
    return (str(error).partition(":")[0].lstrip("-"),)


def _comes_of(
    refused: Collection[str], fields: Collection[str], error: ConfigError, *, user_set: bool
) -> bool:
    """Whether a mistake may be a consequence of replacing refused values.

    Args:
        refused: Full names of the values that were refused.
        fields: Full names of the fields to which the mistake refers.
        error: The mistake.
        user_set: Whether the user set one of these fields.
    """
    sections = {name.rpartition(".")[0] for name in refused}
    return any(
        name in fields or re.search(rf"(?<![\w.]){re.escape(name)}(?![\w.])", str(error))
        for name in refused
    ) or (not user_set and any(name.rpartition(".")[0] in sections for name in fields))
