"""Checks fields of the recipe's dataclasses, and converts the dataclasses to JSON and back.

A section is checked when an object is made, so that a wrong value gives the same message on the
command line, in a recipe and in a stored recipe.json. In all checks, `where` is the field, section
or flag with which the message begins.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, fields, is_dataclass
from functools import cache
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

from fd_large import doors
from fd_large.errors import ConfigError, ConflictError, nearest

_Section = TypeVar("_Section")

LARGEST_NUMBER = 2**63 - 1
"""Largest magnitude of a number in a recipe or on a command line, which a seed may have."""


def field_names(cls: type, prefix: str = "", *, like: str = "") -> dict[str, Any]:
    """Returns {"student.model": type, ...} for all fields of a dataclass, nested fields with dots.

    Args:
        cls: The dataclass.
        prefix: Prefix of all names.
        like: Full name of a field that the user typed, such as "teachers.clip.model". For a field
            of the type dict[str, Section], the names of one entry are returned. The key of this
            entry is taken from `like` ("clip"), or is NAME if `like` names no entry.
    """
    names: dict[str, Any] = {}
    for name, hint in hints_of(cls).items():
        if isinstance(hint, type) and is_dataclass(hint):
            names |= field_names(hint, f"{prefix}{name}.", like=like)
        elif section := entry_type(hint):
            parts = like.split(".")[prefix.count(".") + 1 :]
            names |= field_names(
                section, f"{prefix}{name}.{(parts or [''])[0] or 'NAME'}.", like=like
            )
        else:
            names[prefix + name] = hint
    return names


def entry_type(hint: Any) -> Any | None:
    """Returns the type of the values if `hint` is the type dict[str, DATACLASS], or else None.

    A recipe's field has such a type if users choose the names of its entries, as of `teachers`.
    """
    if get_origin(hint) is not dict:
        return None
    section = get_args(hint)[1]
    return section if is_dataclass(section) else None


def override(section: _Section, values: Mapping[str, Any]) -> _Section:
    """Returns a copy of a dataclass with other `values`, such as {"optim.base_lr": 1e-4}.

    Raises: ConfigError: if a field does not exist or has an invalid value.
    """
    tree = plain(asdict(section))  # type: ignore[call-overload]
    return from_plain(type(section), nested(values, tree), "")


def nested(values: Mapping[str, Any], tree: dict[str, Any] | None = None) -> dict[str, Any]:
    """Returns nested dicts, as {"optim": {"base_lr": 1e-4}} for {"optim.base_lr": 1e-4}.

    If nested dicts are given as `tree`, the values are added to these.
    """
    tree = {} if tree is None else tree
    for name, value in values.items():
        *parents, last = name.split(".")
        branch = tree
        for parent in parents:
            branch = branch.setdefault(parent, {})
        branch[last] = value
    return tree


def describe_type(hint: Any) -> str:
    """Returns the type `hint` of a field in words for a message.

    For example, int | Literal["auto"] gives "a whole number or auto".
    """
    origin = get_origin(hint)
    if origin is Literal:
        options = [str(option) for option in get_args(hint)]
        return options[0] if len(options) == 1 else f"one of {', '.join(options)}"
    if origin in (Union, UnionType):
        return " or ".join(describe_type(part) for part in get_args(hint))
    if origin is tuple:
        count, part = len(get_args(hint)), get_args(hint)[0]
        some = "" if Ellipsis in get_args(hint) else f"{count} "
        return some + {int: "whole numbers", float: "numbers"}.get(part, describe_type(part))
    return {
        int: "a whole number",
        float: "a number",
        str: "text",
        bool: "True or False",
        NoneType: "None",
    }.get(hint, f"a section {getattr(hint, '__name__', hint)}")


# ------------------------------------------------------------------------------------------------


def hints_of(cls: type) -> dict[str, Any]:
    """Returns {name of the field: evaluated type} for the fields of a dataclass."""
    return _hints_of(cls)


@cache  # It is needed whenever a section is made; mypy takes no type[Any] for a cached argument.
def _hints_of(cls: type) -> dict[str, Any]:
    hints = get_type_hints(cls)
    return {f.name: hints[f.name] for f in fields(cls)}


def fits(value: Any, hint: Any) -> bool:
    """Whether a value has the type `hint` of a field; True and False are no numbers here."""
    origin = get_origin(hint)
    if origin is Literal:
        return any(type(value) is type(option) and value == option for option in get_args(hint))
    if origin in (Union, UnionType):
        return any(fits(value, part) for part in get_args(hint))
    if origin is tuple:
        parts = get_args(hint)
        if not isinstance(value, tuple):
            return False
        if Ellipsis in parts:
            return all(fits(item, parts[0]) for item in value)
        return len(value) == len(parts) and all(map(fits, value, parts))
    if hint is Any:
        return True
    if origin is dict:
        return isinstance(value, dict) and all(fits(v, get_args(hint)[1]) for v in value.values())
    if hint in (int, float):  # A whole number will do for a float.
        return isinstance(value, (int, hint)) and not isinstance(value, bool)
    return isinstance(value, hint)


def check_types(section: Any, where: str) -> None:
    """Checks the types of a section's values, and makes paths of the user's own code absolute.

    With absolute paths, a recipe does not depend on the current folder.

    Raises: ConfigError: if a value does not have its field's type, or a number is too large.
    """
    for name, hint in hints_of(type(section)).items():
        value = getattr(section, name)
        _check_type(f"{where}.{name}", value, hint)
        if (whole := _absolute(value)) != value:
            object.__setattr__(section, name, whole)


def _absolute(value: Any) -> Any:
    if isinstance(value, tuple):
        return tuple(map(_absolute, value))
    return doors.absolute(value) if isinstance(value, str) else value


def _check_type(where: str, value: Any, hint: Any) -> None:
    if not fits(value, hint):
        raise ConfigError(
            f"{where}: a value of the wrong type; got {value!r}, expected {describe_type(hint)}."
            " Change the value."
        )
    for number in value if isinstance(value, tuple) else (value,):
        # A NaN is not below the limit either.
        if isinstance(number, (int, float)) and not abs(number) <= LARGEST_NUMBER:
            raise ConfigError(
                f"{where}: an unusable number; got {number}, expected a finite number "
                f"of at most {LARGEST_NUMBER:.2g}. Change --{where.removeprefix('--')}."
            )


def require(
    ok: bool,
    problem: str,
    got: Any,
    expected: str,
    remedy: str = "",
    *,
    beside: tuple[str, ...] = (),
) -> None:
    """Raises ConfigError("PROBLEM; got GOT, expected EXPECTED. REMEDY.") unless `ok`.

    Args:
        ok: Whether the value is valid.
        problem: The field and the problem, "optim.warmup_epochs: warm-up longer than the run".
        got: The value.
        expected: Description of the valid values.
        remedy: How to mend the mistake; "" to suggest another value of the field. If `beside` is
            given, the message suggests to change these fields, and adds the remedy after "or".
        beside: Other fields that decide whether the value is valid.
    """
    if not ok and beside:
        fields = (problem.partition(":")[0], *beside)
        raise ConflictError(f"{problem}; got {got}, expected {expected}.", fields, remedy)
    if not ok:
        remedy = remedy or f"Change --{problem.partition(':')[0].removeprefix('--')}"
        raise ConfigError(f"{problem}; got {got}, expected {expected}. {remedy}.")


def positive(where: str, value: float) -> None:
    """Raises ConfigError unless `value` is finite and above 0."""
    require(0 < value < math.inf, f"{where}: must be positive", value, "a number above 0")


def not_negative(where: str, value: float) -> None:
    """Raises ConfigError unless `value` is finite and 0 or more."""
    require(0 <= value < math.inf, f"{where}: must not be negative", value, "a number of 0 or more")


def within(where: str, value: float, interval: str) -> None:
    """Raises ConfigError unless the value lies in an interval.

    The interval is a text such as "[0, 1)", in which a bracket includes the end and a parenthesis
    excludes it.
    """
    low, high = map(float, interval[1:-1].split(","))
    is_above = value > low if interval.startswith("(") else value >= low
    is_below = value < high if interval.endswith(")") else value <= high
    require(is_above and is_below, f"{where}: out of range", value, f"a number in {interval}")


def at_least(where: str, value: int, least: int, unit: str) -> None:
    """Raises ConfigError if a value, in a `unit` such as "images", is below `least`."""
    require(value >= least, f"{where}: too small", value, f"{least} or more {unit}")


def is_name(where: str, text: str) -> None:
    """Raises ConfigError unless a text can be the name of a folder.

    A path with slashes, a name that begins with a dot, and an empty text are refused; so are spaces
    around the name and characters that cannot be printed.
    """
    is_trimmed = text.strip(" ") == text and text.isprintable() and not text.startswith(".")
    require(
        bool(text) and is_trimmed and not {"/", "\\"} & set(text),
        f"{where}: not a name",
        repr(text),
        "a name without slashes that does not begin with a dot; the folder is set by "
        "runtime.run_dir",
        "Choose another name",
    )


def statistics_or_none(where: str, values: tuple[float, ...]) -> None:
    """Raises ConfigError for invalid image statistics.

    Valid are three means with three standard deviations above 0, one for each colour channel, and
    an empty tuple.
    """
    require(
        len(values) in (0, 6) and all(value > 0 for value in values[3:]),
        f"{where}: invalid means and standard deviations of three channels",
        values,
        "six numbers, the last three above 0, or no number",
    )


def plain(value: Any) -> Any:
    """Returns a copy of `value` with lists in place of tuples, as JSON needs it.

    The values of a dict are treated in the same way; other values are returned as they are.
    """
    if isinstance(value, dict):
        return {name: plain(item) for name, item in value.items()}
    return list(value) if isinstance(value, tuple) else value


def flat(section: Any, prefix: str = "") -> dict[str, Any]:
    """Returns {"optim.base_lr": value, ...} for all fields of a dataclass object.

    Fields of a dataclass or a dict inside it have names with dots. Each name begins with `prefix`.
    """
    named: dict[str, Any] = {}
    for f in fields(section):
        value = getattr(section, f.name)
        if is_dataclass(value):
            named |= flat(value, f"{prefix}{f.name}.")
        elif isinstance(value, dict):  # Named sections, see entry_type; or values without a type.
            for name, entry in value.items():
                inside = f"{prefix}{f.name}.{name}"
                named |= flat(entry, f"{inside}.") if is_dataclass(entry) else {inside: entry}
        else:
            named[prefix + f.name] = value
    return named


def flat_plain(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Returns {"optim.base_lr": value, ...} for nested dicts, such as those of recipe.json."""
    named: dict[str, Any] = {}
    for name, value in values.items():
        inside = isinstance(value, dict)
        named |= flat_plain(value, f"{prefix}{name}.") if inside else {prefix + name: value}
    return named


def from_plain(cls: type[_Section], values: Any, prefix: str) -> _Section:
    """Returns a dataclass made from nested dicts; absent fields have their defaults.

    It is the inverse of `plain(asdict(...))`. The values are as read from JSON. If the fields of
    `cls` depend on the values, it has a classmethod `class_for(values)`, which returns the subclass
    to use. `prefix` stands before the fields' names in messages.

    Raises: ConfigError: if a name is unknown, a field without a default is absent, or a value is
        invalid.
    """
    where = prefix.rstrip(".") or "recipe"
    if not isinstance(values, dict):
        raise ConfigError(
            f"{where}: not a section; got {values!r}, expected names with values. Write the"
            " section as a JSON object."
        )
    if class_for := getattr(cls, "class_for", None):
        cls = class_for(values)
    hints = hints_of(cls)
    arguments: dict[str, Any] = {}
    for name, value in values.items():
        if name not in hints:
            close = nearest(prefix + name, [prefix + known for known in hints])
            raise ConfigError(f"{prefix}{name}: unknown field; {close}. Correct the name.")
        hint = hints[name]
        if isinstance(hint, type) and is_dataclass(hint):
            value = from_plain(hint, value, f"{prefix}{name}.")
        elif (entry := entry_type(hint)) and isinstance(value, dict):
            value = {
                key: _entry(entry, item, f"{prefix}{name}.", key) for key, item in value.items()
            }
        else:
            value = tuple(value) if isinstance(value, list) else value  # JSON has no tuples.
            _check_type(prefix + name, value, hint)
        arguments[name] = value
    try:
        return cls(**arguments)
    except TypeError as error:  # A field without a default is absent.
        raise ConfigError(f"{where}: incomplete; {error}. Add the field.") from None


def _entry(cls: type[_Section], values: Any, prefix: str, key: str) -> _Section:
    """Returns an entry of a dict of sections, made by `from_plain`.

    The class cannot know the entry's name, and calls it NAME; in messages it is replaced by `key`.
    `prefix` is the dict's name with a dot, such as "teachers.".
    """
    try:
        return from_plain(cls, values, f"{prefix}{key}.")
    except ConflictError as error:
        raise error.renamed(lambda n: n.replace(f"{prefix}NAME.", f"{prefix}{key}.")) from None
    except ConfigError as error:
        raise ConfigError(str(error).replace(f"{prefix}NAME.", f"{prefix}{key}.")) from None
