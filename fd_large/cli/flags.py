"""The words after a command to a run: a recipe, and the fields that flags override.

Flags come from the dataclasses of `recipes/sections.py` through tyro; none is written here twice.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass, field, fields, make_dataclass, replace
from difflib import get_close_matches
from io import StringIO
from typing import Any, get_type_hints

from fd_large.errors import ConfigError, nearest
from fd_large.recipes import registry
from fd_large.recipes.fields import describe_type, field_names
from fd_large.recipes.run import Run


@dataclass(frozen=True, kw_only=True)
class TrainFlags:
    """Train a recipe. A recipe gives every field its value; flags override field by field."""

    recipe: str = registry.DEFAULT_RECIPE
    """Run of record whose values are the defaults below; without it quickstart."""
    deepspeed_config: str = ""
    """DeepSpeed's JSON, for instance ds_configs/zero3.json; needed."""
    fresh: bool = False
    """Start anew although the folder of the run holds checkpoints."""
    profile: int = 0
    """Steps to trace with torch's profiler, after three others; RUN/profile/ gets the trace."""
    local_rank: int = -1
    """Passed by the deepspeed launcher; ignored."""


def parse_train(arguments: list[str]) -> tuple[Run, TrainFlags]:
    """Turns the words after `train` into a run and the flags beside it.

    Raises:
        ConfigError: A recipe, field or value that does not exist or does not fit.
    """
    words = _group(arguments)
    run = _recipe(words)
    flags_type = _flags_type(run)
    known = field_names(flags_type)
    words = _switches(words, known)
    for name in words:
        if name not in known and known.get(_switched_on(name)) is not bool:
            raise ConfigError(f"--{name}: no such field; {_nearest_field(name, known)}")
    parsed = _tyro(flags_type, _ungroup(words))
    if parsed is None:
        bad = next((n for n, v in words.items() if not _parses_alone(flags_type, n, v)), "")
        got = " ".join(words.get(bad, [])) or "nothing"
        raise ConfigError(
            f"--{bad}: a value of the wrong type; got {got}, expected"
            f" {describe_type(known.get(bad, str))}. Mend the value."
        )
    sections = {f.name: getattr(parsed, f.name) for f in fields(Run) if f.name != "name"}
    return replace(run, **sections), parsed


def parse_run(arguments: list[str]) -> Run:
    """The same for commands that have flags of their own.

    Raises:
        ConfigError: As above.
    """
    return parse_train(arguments)[0]


def print_train_help(arguments: list[str]) -> None:
    """Prints every flag with the values of the recipe that the words name.

    Raises:
        ConfigError: There is no such recipe.
    """
    import tyro

    words = _group([word for word in arguments if word not in ("-h", "--help")])
    flags_type = _flags_type(_recipe(words))
    with suppress(SystemExit):
        tyro.cli(flags_type, args=["--help"], prog="fd_large/train.py", use_underscores=True)


# ------------------------------------------------------------------------------------------------


def _flags_type(run: Run) -> type[TrainFlags]:
    """The flags of `train` as a dataclass: the plain ones, then the sections with run's values."""
    hints = get_type_hints(Run)
    sections = [
        (f.name, hints[f.name], field(default=getattr(run, f.name)))
        for f in fields(Run)
        if f.name != "name"
    ]
    named = TrainFlags(recipe=run.name)
    plain = [
        (f.name, get_type_hints(TrainFlags)[f.name], field(default=getattr(named, f.name)))
        for f in fields(TrainFlags)
    ]
    return make_dataclass(
        "Train", [*plain, *sections], bases=(TrainFlags,), frozen=True, kw_only=True
    )


def _group(arguments: list[str]) -> dict[str, list[str]]:
    """Splits words at the flags: {"student.architecture.depths": ["2", "2"]}; the last one wins."""
    words: dict[str, list[str]] = {}
    values: list[str] | None = None
    for word in arguments:
        if word.startswith("--"):
            name, equals, value = word[2:].partition("=")
            values = [value] if equals else []
            # A later flag replaces an earlier one: scripts append the user's overrides.
            name = name.replace("-", "_")
            words.pop(name, None)
            words[name] = values
        elif values is None:
            raise ConfigError(
                f"train: a word without a flag; got {word!r}, expected --section.field VALUE."
                " Name the field before the value."
            )
        else:
            values.append(word)
    return words


def _switches(words: dict[str, list[str]], known: Mapping[str, Any]) -> dict[str, list[str]]:
    """Puts `--guard.enabled False` as tyro wants it, `--guard.no_enabled`."""
    turned = {}
    for name, values in words.items():
        if known.get(name) is bool and values in (["True"], ["False"]):
            section, dot, switch = name.rpartition(".")
            name = name if values == ["True"] else f"{section}{dot}no_{switch}"
            values = []
        turned[name] = values
    return turned


def _switched_on(name: str) -> str:
    section, dot, switch = name.rpartition(".")
    return f"{section}{dot}{switch.removeprefix('no_')}"


def _recipe(words: Mapping[str, list[str]]) -> Run:
    return registry.get(" ".join(words.get("recipe", [registry.DEFAULT_RECIPE])))


def _ungroup(words: dict[str, list[str]]) -> list[str]:
    return [word for name, values in words.items() for word in (f"--{name}", *values)]


def _nearest_field(name: str, known: Mapping[str, Any]) -> str:
    if "." not in name:  # A field typed without its section.
        whole = [field_name for field_name in known if field_name.split(".")[-1] == name]
        if whole:
            return f"nearest: {', '.join(whole[:3])}"
    # A near miss is told alone; the wider model of `nearest` is for words that are further off.
    close = get_close_matches(name, known, n=2, cutoff=0.85)
    return f"nearest: {', '.join(close)}" if close else nearest(name, known)


def _parses_alone(flags_type: type[TrainFlags], name: str, values: list[str]) -> bool:
    """Whether a flag's words are of its type; that it fits no other field is another matter."""
    try:
        return _tyro(flags_type, _ungroup({name: values})) is not None
    except ConfigError:
        return True


def _tyro(flags_type: type[TrainFlags], arguments: list[str]) -> Any | None:
    """Parses silently; None if tyro refuses, so that the mistake is told in one sentence."""
    import tyro

    # Its boxes go to stderr even with console_outputs=False.
    with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
        try:
            return tyro.cli(flags_type, args=arguments, console_outputs=False, use_underscores=True)
        except SystemExit:
            return None
